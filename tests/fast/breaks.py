"""`python -m tests.mutants --only fast`: one-line breaks of the fast path, each with the test that has to fail with it.

An optimisation whose exactness no break can upset is not tested at all. A break replaces a text in a copy of the
package; its test runs in a process forked from one that has imported torch and transformers, but no mmft.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

REPOSITORY = Path(__file__).resolve().parents[2]
SECONDS = 300.0
"""A test that takes longer with a break in it has failed."""


@dataclass(frozen=True)
class Break:
    """`old` becomes `new` in `file`, and `test` has to fail; `what` says what is wrong then."""

    optimisation: str
    what: str
    file: str
    old: str
    new: str
    test: str


def all_breaks() -> list[Break]:
    """Every break, by optimisation in the order of the plan."""
    from tests.fast.breaks_forward import FORWARD
    from tests.fast.breaks_native import NATIVE
    from tests.fast.breaks_rows import ROWS

    return [
        Break(name, what, f"mmft/{file}", old, new, f"tests/{test}")
        for table in (ROWS, FORWARD, NATIVE)
        for name, file, entries in table
        for what, old, new, test in entries
    ]


def broken(one: Break, folder: Path) -> None:
    """The package in `folder` (as links) with the break in it. Raises ValueError when its text is not there once."""
    text = (REPOSITORY / one.file).read_text()
    if text.count(one.old) != 1:
        raise ValueError(f"{one.file} holds {text.count(one.old)} times: {one.old}")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "mmft", folder / "mmft", ignore=ignore, copy_function=os.symlink)
    (folder / one.file).unlink()
    (folder / one.file).write_text(text.replace(one.old, one.new))


def warm() -> None:
    """Import what the tests need of others, and run no tensor operation: children are forked from here."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import peft
    import pytest  # noqa: F401
    import torch
    import transformers
    from transformers.models import auto, llama, llava, qwen2_vl, smolvlm  # noqa: F401

    del peft, transformers
    torch.set_num_threads(1)
    assert not any(name.partition(".")[0] == "mmft" for name in sys.modules), "mmft is imported from the copy only"


@contextlib.contextmanager
def _forked(folder: Path, out: Path, test: str) -> Iterator[int]:
    """The process of a child that runs a test against the package in `folder`; it exits as pytest does."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        yield pid
        return
    code = 70
    try:
        os.setpgid(0, 0)
        with out.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path.insert(0, str(folder))
        (folder / "tests").symlink_to(REPOSITORY / "tests")
        os.chdir(folder)  # what a test starts itself imports from here
        import pytest

        import mmft

        assert Path(mmft.__file__).is_relative_to(folder)
        words = [str(REPOSITORY / test), "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-cov"]
        words += [
            f"--basetemp={folder / 'pytest'}",
            "--rootdir",
            str(REPOSITORY),
            "-c",
            str(REPOSITORY / "pyproject.toml"),
        ]
        code = int(pytest.main(words))
    finally:
        os._exit(code)


def run_test(one: Break | None, test: str) -> tuple[int | None, str]:
    """pytest's exit code for a test with a break in the package (None: it did not end), and what it said last."""
    folder = Path(tempfile.mkdtemp(prefix="mmft-break-"))
    try:
        if one is None:
            (folder / "mmft").symlink_to(REPOSITORY / "mmft")
        else:
            broken(one, folder)
        with _forked(folder, folder / "out", test) as pid:
            end, code = time.monotonic() + SECONDS, None
            while code is None and time.monotonic() < end:
                done, status = os.waitpid(pid, os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if done else None
                time.sleep(0.02)
            if code is None:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        lines = (folder / "out").read_text(errors="replace").splitlines()
        told = [line for line in lines if line.startswith(("E  ", "FAILED", "ERROR"))] or lines[-3:] or ["nothing"]
        return code, told[0][:200]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def try_breaks(chosen: Sequence[Break], show: TextIO | None = None) -> list[dict[str, str | bool]]:
    """One row per break: whether its test failed (and nothing but a test that ran and failed counts)."""
    warm()
    rows: list[dict[str, str | bool]] = []
    for one in chosen:
        begin = time.monotonic()
        code, text = run_test(one, one.test)
        good = code in (1, None)
        rows.append({"optimisation": one.optimisation, "what": one.what, "test": one.test, "caught": good, "by": text})
        if show is not None:
            mark = "caught    " if good else "NOT CAUGHT"
            seconds = time.monotonic() - begin
            show.write(f"{mark} {one.optimisation:<18} {one.what:<62} {seconds:4.0f} s\n")
            show.write("" if good else f"      {one.test}: exit {code}, {text}\n")
            show.flush()
    return rows


def main(only: str, out: str | None) -> int:
    """One line per break (of the optimisations named in `only`); exit 1 when one is not caught."""
    chosen = [one for one in all_breaks() if not only or one.optimisation in only.split(",")]
    rows = try_breaks(chosen, sys.stdout)
    missed = sum(not row["caught"] for row in rows)
    sys.stdout.write(f"{len(rows) - missed} of {len(rows)} breaks caught\n")
    if out:
        Path(out).write_text(json.dumps({"breaks": rows}, indent=1) + "\n")
    return 1 if missed or not rows else 0
