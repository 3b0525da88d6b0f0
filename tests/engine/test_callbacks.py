"""Progress without a terminal: plain lines, not too many."""

from __future__ import annotations

import pytest

from mmft.engine import callbacks
from mmft.engine.callbacks import Progress
from mmft.engine.state import TrainState
from mmft.journal import Journal

METRICS = {"loss": 1.25, "learning_rate": 1e-3, "samples_per_second": 5.0}


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, 3), (1000.0, 0)])
def test_plain_lines_where_there_is_no_terminal(
    seconds: float, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "PLAIN_SECONDS", seconds)
    progress, state = Progress(Journal(None)), TrainState()
    progress.on_start(state, 3)
    for _ in range(3):
        state.step += 1
        progress.on_step(state, METRICS)
    progress.on_end(state)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(said) == lines
    if lines:
        assert said[0].startswith("step 1 of 3: loss 1.2500, lr 1.00e-03, samples/s 5.0, left 0:0")
