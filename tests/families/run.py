"""The table of all families: each is proved in a process of its own, so a crash or a hang costs one row."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.families.proof import CANNOT, OK, SKIPPED, STEPS, Row, prove
from tests.families.tiny import Impossible, Tiny

Kinds = dict[str, Callable[[], Tiny | Impossible]]
HERE = Path(__file__).parent


def kinds() -> tuple[Kinds, dict[str, str]]:
    """All families of `kinds_*.py`, and module -> error for those that cannot be imported."""
    found: Kinds = {}
    broken: dict[str, str] = {}
    for path in sorted(HERE.glob("kinds_*.py")):
        try:
            found.update(getattr(importlib.import_module(f"tests.families.{path.stem}"), "KINDS", {}))
        except Exception as error:  # another builder's file may be half written
            broken[path.stem] = f"{type(error).__name__}: {error}"
    return found, broken


def wanted() -> dict[str, list[str]]:
    """The names that must have a row, from the installed transformers: group -> names."""
    from transformers.models.auto import modeling_auto as auto

    pictures = list(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    multimodal = [name for name in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES if name not in pictures]
    others = (
        "clip siglip siglip2 chinese_clip altclip align groupvit vision-text-dual-encoder clap speech-encoder-decoder"
        " bert vit dinov2 wav2vec2 whisper timm_wrapper"
    )
    return {
        "image-text-to-text": pictures,
        "multimodal": multimodal,
        "others": [name for name in others.split() if name not in pictures],
    }


def main(arguments: Sequence[str]) -> int:
    """Prove the named families (all without a name), print the table; 1 when a row that should pass does not."""
    options = _options(arguments)
    known, broken = kinds()
    for module, error in broken.items():
        print(f"{module}.py cannot be imported: {error}", file=sys.stderr)
    groups = wanted()
    groups["variants"] = [name for name in known if not any(name in group for group in groups.values())]
    names = options.names or [name for group in groups.values() for name in group]
    if options.here:
        for name in names:
            print(prove(name, known[name], strict=True))
        return 0
    started = time.monotonic()
    rows = run_all(names, known, jobs=options.jobs, timeout=options.timeout)
    rows = [rows[name] for name in names]
    print(table(rows))
    print(f"\n{summary(rows, groups, whole=not options.names)}; {time.monotonic() - started:.0f} s")
    if options.json:
        content = [dataclasses.asdict(row) | {"passed": row.passed} for row in rows]
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if broken or any(row.possible and not row.passed for row in rows) else 0


def run_all(names: Sequence[str], known: Mapping[str, Any], *, jobs: int = 2, timeout: float = 300.0) -> dict[str, Row]:
    """Family -> row. Each family runs in a fork of this process (everything is imported already)."""
    context = multiprocessing.get_context("fork")
    rows: dict[str, Row] = {}
    queue = list(dict.fromkeys(names))
    running: dict[Connection, tuple[str, Any, float]] = {}
    while queue or running:
        while queue and len(running) < jobs:
            name = queue.pop(0)
            if name not in known:
                rows[name] = Row(name, built="no tiny model was written for this family")
                continue
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(sender, name, known[name]))
            process.start()
            sender.close()
            running[receiver] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for receiver, (name, process, begun) in list(running.items()):
            if receiver in ready:
                rows[name] = _received(receiver, name, process)
            elif time.monotonic() - begun > timeout:
                process.kill()
                rows[name] = Row(name, built=f"no answer within {timeout:.0f} s", seconds=timeout)
            else:
                continue
            process.join()
            del running[receiver]
            _progress(rows[name], len(rows), len(set(names)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """One line a family: the steps, the seconds, and the first trouble or the note."""
    width = max([len(row.family) for row in rows] + [6])
    lines = [f"{'family':<{width}}  " + "  ".join(STEPS) + "   seconds  note"]
    for row in rows:
        cells = [
            f"{value if value in (OK, SKIPPED, CANNOT) else 'FAIL':<{len(step)}}"
            for step in STEPS
            for value in [getattr(row, step)]
        ]
        text = "; ".join(part for part in (row.trouble, row.note) if part)
        lines.append(f"{row.family:<{width}}  {'  '.join(cells)}  {row.seconds:8.1f}  {text}".rstrip())
    return "\n".join(lines)


def summary(rows: Sequence[Row], groups: Mapping[str, Sequence[str]], *, whole: bool = True) -> str:
    """`N of 97 image-text-to-text, …` (of those that ran, when not all were asked for)."""
    found = {row.family: row for row in rows}
    parts = []
    for group, names in groups.items():
        asked = [name for name in names if name in found or whole]
        passed = sum(1 for name in asked if name in found and found[name].passed)
        cannot = sum(1 for name in asked if name in found and not found[name].possible)
        if asked:
            parts.append(f"{passed} of {len(asked)} {group}" + (f" ({cannot} cannot run)" if cannot else ""))
    return ", ".join(parts)


def _child(sender: Connection, name: str, make: Callable[[], Tiny | Impossible]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        row = prove(name, make)
    except BaseException as error:  # whatever it is, the other families go on
        row = Row(name, built=f"{type(error).__name__}: {error}"[:400])
    sender.send(row)
    sender.close()


def _received(receiver: Connection, name: str, process: Any) -> Row:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Row(name, built=f"the process died (exit code {process.exitcode})")


def _progress(row: Row, done: int, total: int) -> None:
    state = "ok" if row.passed else "cannot" if not row.possible else row.trouble
    print(f"[{done}/{total}] {row.family}: {state} ({row.seconds:.1f} s)", file=sys.stderr, flush=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.families", description=main.__doc__)
    parser.add_argument("names", nargs="*", help="families (all if none is given)")
    parser.add_argument("--json", help="write the rows to this file too")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one family")
    parser.add_argument("--here", action="store_true", help="in this process, with the full traceback")
    return parser.parse_args(arguments)
