"""The journal: strict JSON lines, torn lines, ranks, quiet, and no terminal escapes from data."""

from __future__ import annotations

import json
import subprocess
import sys

from mmft.journal import Journal, read_jsonl


def lines(path):
    return [json.loads(line, parse_constant=lambda word: 1 / 0) for line in path.read_text().splitlines()]


def test_events_and_metrics_are_strict_json(tmp_path):
    journal = Journal(tmp_path, quiet=True)
    journal.event("start", step=0, path=tmp_path, ids=("a", "b"))
    journal.metrics(1, loss=0.5, norm=float("nan"), peak=float("-inf"))
    event = lines(tmp_path / "events.jsonl")[0]
    assert event.pop("time").endswith("+00:00")
    assert event == {"kind": "start", "step": 0, "path": str(tmp_path), "ids": ["a", "b"]}
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "norm": "nan", "peak": "-inf"}]


def test_other_ranks_write_events_only_and_print_nothing(tmp_path, capsys):
    journal = Journal(tmp_path, rank=1)
    journal.metrics(1, loss=1.0)
    journal.say("hello")
    journal.warn("careful")
    journal.table("t", ["a"], [["1"]])
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "metrics.jsonl").exists()
    event = lines(tmp_path / "events.jsonl")[0]
    assert (event["kind"], event["rank"], event["text"]) == ("warning", 1, "careful")


def test_console_goes_to_stderr_and_text_is_not_markup(capsys):
    journal = Journal(None)
    journal.say("[red]x[/red] \x1b[31m\r")
    journal.warn("w")
    journal.table("title", ["name", "n"], [["[b]a", "1,000"], ["\x1b]0;evil\x07", "2"]])
    with journal.progress(2, "steps") as bar:
        bar.update(1, loss=0.1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("[red]x[/red] \\x1b[31m\\x0d\nwarning: w\n")
    assert "[b]a" in err and "\x1b" not in err and "\x07" not in err


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    journal = Journal(tmp_path, quiet=True)
    journal.metrics(1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    journal.metrics(2, loss=2.0)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_rewind_drops_what_a_resumed_run_writes_again(tmp_path):
    journal = Journal(tmp_path, quiet=True)
    for step in range(5):
        journal.metrics(step, loss=float(step))
    journal.rewind(2)
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_rich_is_not_imported_before_something_is_printed():
    code = (
        "import sys; from mmft.journal import Journal; j = Journal(None, quiet=True); j.say('x'); j.table('t', [], []);"
        "print([m for m in ('rich', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
