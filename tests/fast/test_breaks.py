"""The table of breaks: its texts are there, its tests exist, every optimisation has some; one is tried whole."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mmft.fast.known import CANDIDATES
from tests.fast.breaks import REPOSITORY, all_breaks


def test_every_optimisation_has_breaks_whose_text_is_there():
    """`make test-mutants` runs them all; here only that none of them is about code that is no more."""
    found = Counter(one.optimisation for one in all_breaks())
    assert all(found[one.name] >= 3 for one in CANDIDATES), found
    for one in all_breaks():
        times = (REPOSITORY / one.file).read_text().count(one.old)
        assert times == 1, f"{one.file} holds {times} times: {one.old!r} (adapt tests/fast/breaks_*.py)"
        path, _, name = one.test.partition("::")
        tree = ast.parse((REPOSITORY / path).read_text())
        assert name.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, one


def test_a_break_is_caught_and_sound_code_is_not(tmp_path: Path):
    """One whole way in a process of its own: its test fails with the break, and passes without."""
    code = """
import sys
from dataclasses import replace
from tests.fast.breaks import all_breaks, run_test, try_breaks
one = next(one for one in all_breaks() if one.what == "a block sees one key too few")
(row,) = try_breaks([one])
assert row["caught"], row
assert run_test(None, one.test)[0] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
