"""METEOR 1.5 (Denkowski and Lavie 2014) by its own Java program, the one that the COCO tools run.

The program matches an answer with each reference (exact words, stems, synonyms, paraphrases) and gives 23 counts for
the best one; the score is a formula over sums of them, so that a bootstrap needs no further match. It needs `java` and
the package pycocoevalcap, in which the program and its English paraphrase table lie; `why_not` says what is missing.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmft.errors import DataError
from mmft.evaluation.metrics.base import RowMetric, check_rows, tokenize

_PACKAGE, _JAR = "pycocoevalcap", "pycocoevalcap/meteor/meteor-1.5.jar"
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.20, 0.60, 0.75
_WEIGHTS = (1.0, 0.6, 0.8, 0.6)
"""Parameters and matcher weights of its English ranking task: exact, stem, synonym, paraphrase."""
_COUNTS = 23
_CHUNKS = 20


def _jar() -> Path | None:
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_JAR)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def why_not() -> str | None:
    """What METEOR lacks on this machine; None when it can run."""
    if shutil.which("java") is None:
        return "there is no `java` on the PATH"
    return None if _jar() is not None else f"the package {_PACKAGE} is not installed"


class _Program:
    """The running program; one line in, one line out. Starting it takes seconds (it reads the paraphrase table)."""

    def __init__(self) -> None:
        jar = _jar()
        missing = why_not()
        if missing is not None or jar is None:
            raise DataError(
                f"meteor cannot run: {missing}",
                where="evaluate.metrics",
                do="install Java and pip install pycocoevalcap, or take meteor out of evaluate.metrics",
            )
        self.process = subprocess.Popen(
            ["java", "-jar", "-Xmx2G", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=jar.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        weakref.finalize(self, self.process.kill)

    def counts(self, answer: str, references: Sequence[str]) -> list[float]:
        """The 23 counts of an answer against the reference that fits best."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ||| ".join(["SCORE", *references, answer]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline().split()
        if len(line) != _COUNTS:
            raise DataError(
                f"meteor's program answered {' '.join(line)[:80]!r}, not {_COUNTS} counts",
                where=f"answer {answer[:80]!r}",
                do="report this, or take meteor out of evaluate.metrics",
            )
        return [float(value) for value in line]


class Meteor(RowMetric):
    """`F (1 - 0.6 f^0.2)` over summed counts: F the weighted harmonic mean of precision and recall (recall counts
    0.85), f the chunks per matched word; function words weigh 0.25, content words 0.75."""

    name = "meteor"

    def __init__(self) -> None:
        self._program: _Program | None = None
        self._lock = threading.Lock()

    def rows(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """(N, 23) counts. A row that is matched in full as one chunk adds no chunk, as in the program."""
        check_rows(self.name, predictions, references)
        out = np.zeros((len(predictions), _COUNTS))
        with self._lock:
            if self._program is None or self._program.process.poll() is not None:
                self._program = _Program()
            for index, (prediction, row) in enumerate(zip(predictions, references, strict=True)):
                out[index] = self._program.counts(tokenize(prediction), [tokenize(reference) for reference in row])
        whole = (out[:, 21] == out[:, 0]) & (out[:, 22] == out[:, 1]) & (out[:, _CHUNKS] == 1)
        out[whole, _CHUNKS] = 0
        return out

    def finish(self, sums: np.ndarray, rows: int) -> np.ndarray:
        """METEOR, shape (...), from summed counts (..., 23)."""
        answer, reference = (
            _DELTA * (sums[..., place] - sums[..., place + 2]) + (1 - _DELTA) * sums[..., place + 2] for place in (0, 1)
        )
        matched = [
            sum(
                weight * (_DELTA * sums[..., start] + (1 - _DELTA) * sums[..., start + 2])
                for weight, start in zip(_WEIGHTS, range(4 + side, 20 + side, 4), strict=True)
            )
            for side in (0, 1)
        ]
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = matched[0] / answer, matched[1] / reference
            mean = 1.0 / ((1 - _ALPHA) / precision + _ALPHA / recall)
            pieces = sums[..., _CHUNKS] / ((sums[..., 21] + sums[..., 22]) / 2)
            score = mean * (1.0 - _GAMMA * pieces**_BETA)
        return np.nan_to_num(np.where(np.isfinite(score), score, 0.0))
