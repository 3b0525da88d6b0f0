"""Every fault at its reduced count; `make test-faults` runs them at full count."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.__main__ import all_faults
from tests.faults.trial import REPOSITORY
from tests.mutants import Mutant, all_mutants

NAMES = [fault.name for fault in all_faults()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The rows of one run of all faults, in a process of its own: its trials are forked before torch has threads."""
    out = tmp_path_factory.mktemp("faults") / "rows.json"
    words = [sys.executable, "-m", "tests.faults", "--reduced", "--no-mutants", "--json", str(out)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800)
    assert out.is_file(), done.stderr[-3000:]
    return {row["fault"]: row for row in json.loads(Path(out).read_text())["faults"]}


@pytest.mark.parametrize("mutant", all_mutants(), ids=lambda mutant: f"{mutant[0]} {mutant[1]}")
def test_mutant_can_be_put_in(mutant: Mutant) -> None:
    """`make test-mutants` runs their trials; here the text that each replaces is still the package's."""
    assert (REPOSITORY / mutant[1]).read_text().count(mutant[2]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_fault_is_survived(rows: dict[str, dict], name: str) -> None:
    row = rows[name]
    assert row["tried"] and not row["failures"], row["failures"][:3]
    assert row["survived"] == row["tried"]
