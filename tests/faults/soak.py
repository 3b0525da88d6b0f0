"""F21: thousands of steps with evaluations and checkpoints; memory and open files stay where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.trial import Fault, Tally, expect, finish, recipe, run_of, train

EVERY = 50


def watched(out: Path) -> Callable[[], None]:
    """A `prepare`: resident size and open files every `EVERY` steps, as lines of `out`."""

    def prepare() -> None:
        from mmft.engine.callbacks import MetricsWriter

        inner = MetricsWriter.on_step

        def on_step(self: Any, state: Any, metrics: dict[str, float]) -> None:
            inner(self, state, metrics)
            if state.step % EVERY == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                row = [state.step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))]
                with out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")

        MetricsWriter.on_step = on_step  # type: ignore[method-assign]

    return prepare


def soak(tally: Tally, count: int) -> None:
    """`count` steps; the slope is a line's through all but the first third."""
    import numpy as np

    held = {"data.eval": [{"path": recipe(tally)["data"]["train"][0]["path"], "name": "held"}]}
    held |= {"evaluate.models": ["adapter"], "evaluate.max_new_tokens": 2, "evaluate.bootstrap_samples": 10}
    values = recipe(
        tally,
        held | {"train.max_steps": count, "train.save_steps": 100, "train.eval_steps": 100, "train.logging_steps": 10},
    )
    place = tally.place("run")
    with tally.trial(f"{count} steps"):
        code = finish(train(values, place, prepare=watched(place / "seen")), place / "log", seconds=3600)
        expect(code == 0, f"exit {code}: {(place / 'log').read_text()[-500:]}")
        rows = np.array([json.loads(line) for line in (place / "seen").read_text().splitlines()], dtype=float)
        late = rows[len(rows) // 3 :]
        slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) * 1000 / 1e6
        tally.measure(slope)
        span = (late[-1, 0] - late[0, 0]) / 1000
        # Over few steps one page fault more or less is a steep slope: a megabyte in all is always free.
        expect(slope < max(1.0, 1.0 / span), f"{slope:.2f} MB for 1,000 steps")
        tally.notes.append(f"{int(late[:, 2].min())} to {int(late[:, 2].max())} open files")
        expect(late[-1, 2] <= late[0, 2], f"open files went from {late[0, 2]:.0f} to {late[-1, 2]:.0f}")
        expect(len(list((run_of(place) / "checkpoints").iterdir())) <= 3, "checkpoints were left")


FAULTS = (Fault("F21", "a long run with evaluations and checkpoints", 10_000, 600, "MB for 1,000 steps", soak),)
MUTANTS = (
    (
        "F21",
        "mmft/engine/checkpoint.py",
        "    verify_folder(final)\n",
        "    verify_folder(final)\n        globals().setdefault('_kept', []).append(open(final / 'state.json'))\n",
    ),
)
