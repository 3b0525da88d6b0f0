"""The process behind `tests.runs.Stable`: imports mmft's heavy modules once and forks a child per command.

Reads JSON lines: {"words", "log", "file_limit", "module"} starts a child and answers its process id, {"wait": pid}
answers its exit status. Runs no tensor operation itself, so that no thread pool is lost in a fork.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import traceback
from typing import Any


def child(question: dict[str, Any]) -> int:
    """Be `mmft WORDS`; returns the exit status."""
    from mmft.cli import main

    handle = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if question["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (question["file_limit"], question["file_limit"]))
    sys.argv = ["mmft", *question["words"]]
    try:
        if question["module"]:
            runpy.run_module("mmft", run_name="__main__", alter_sys=True)
        else:
            main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Answer questions until standard input ends."""
    import mmft.run  # noqa: F401
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                code = child(question)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        answers.write(f"{answer}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
