"""What a run tells: the console on rank 0 (stderr, rich), and JSON lines that plots and reports read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmft.files import append_jsonl, write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """`text` with control characters spelled out, so that a data row cannot steer the terminal."""
    return text.translate(_CONTROL)


class Bar:
    """A progress bar, or nothing at all where there is no terminal to draw on."""

    def __init__(self, progress: Progress | None = None, task: TaskID | None = None) -> None:
        self._progress = progress
        self._task = task

    def update(self, advance: float = 1, **fields: object) -> None:
        """Go on by `advance`; `fields` (loss, tokens a second, …) are shown behind the bar."""
        if self._progress is None or self._task is None:
            return
        if fields:
            shown = "  ".join(f"{name} {_short(value)}" for name, value in fields.items())
            self._progress.update(self._task, advance=advance, fields=printable(shown))
        else:
            self._progress.update(self._task, advance=advance)


class Journal:
    """Console and records of one process of a run.

    Rank 0 writes all; other ranks write only events (with their rank), and print nothing. `folder` None: no records.
    `quiet` silences the console, not the records. Raises CheckpointError when a record cannot be written.
    """

    def __init__(self, folder: Path | None, *, rank: int = 0, quiet: bool = False) -> None:
        self.folder = None if folder is None else Path(folder)
        self.rank = rank
        self.quiet = quiet or rank > 0
        self._console: Console | None = None

    def event(self, kind: str, **fields: object) -> None:
        """Append `{"time", "kind", ...}` to events.jsonl; time is UTC."""
        if self.folder is not None:
            head = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "kind": kind}
            rank = {"rank": self.rank} if self.rank else {}
            append_jsonl(self.folder / EVENTS, finite({**head, **rank, **fields}))

    def metrics(self, step: int, **values: float) -> None:
        """Append `{"step", ...}` to metrics.jsonl (rank 0); NaN and infinities become the texts "nan", "inf"."""
        if self.folder is not None and self.rank == 0:
            append_jsonl(self.folder / METRICS, finite({"step": step, **values}))

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`: a resumed run writes them again."""
        path = None if self.folder is None or self.rank else self.folder / METRICS
        if path is not None and path.is_file():
            write_text(path, "".join(_kept(path, step)))

    def say(self, text: str) -> None:
        """Print one message."""
        if not self.quiet:
            self._terminal().print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a message that must not be missed, and record it as an event (all ranks)."""
        self.event("warning", text=text)
        if not self.quiet:
            self._terminal().print(
                "warning: " + printable(text), style="yellow", markup=False, highlight=False, soft_wrap=True
            )

    @property
    def interactive(self) -> bool:
        """Whether a person watches a terminal, so that bars are drawn."""
        return not self.quiet and self._terminal().is_terminal

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; columns whose cells are all numbers are set to the right."""
        if self.quiet:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(printable(title)), title_justify="left")
        for index, column in enumerate(columns):
            numbers = bool(rows) and all(_is_number(row[index]) for row in rows)
            table.add_column(Text(printable(column)), justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self._terminal().print(table)

    @contextlib.contextmanager
    def progress(self, total: float | None, description: str) -> Iterator[Bar]:
        """A bar that goes to `total`; nothing is drawn where stderr is not a terminal."""
        if self.quiet or not self._terminal().is_terminal:
            yield Bar()
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}", markup=False)
        fields = TextColumn("{task.fields[fields]}", markup=False)
        parts = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), fields)
        with Progress(*parts, console=self._terminal()) as progress:
            yield Bar(progress, progress.add_task(printable(description), total=total, fields=""))

    def _terminal(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console


def finite(value: Any) -> Any:
    """`value` with non-finite floats as texts: strict JSON has no NaN, and a NaN must not vanish from the log."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that `append_jsonl` wrote; lines torn by a kill are left out."""
    with Path(path).open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row


def _kept(path: Path, step: int) -> Iterator[str]:
    for row in read_jsonl(path):
        if row.get("step", step) <= step:
            yield json.dumps(row, ensure_ascii=False) + "\n"


def _is_number(cell: str) -> bool:
    return cell.strip("-+").replace(",", "").replace(".", "", 1).rstrip("%").strip().isdigit()


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
