"""The house form of errors, exit codes, nearest names, and that errors survive a process wall."""

from __future__ import annotations

import pickle

import pytest

from mmft import errors
from mmft.errors import MmftError, Problem, RecipeError, choices, nearest


def test_house_form_of_one_problem():
    error = RecipeError("x: 3 is odd", where="a.yaml:2", allowed="2, 4", do="write 2")
    assert str(error) == "RecipeError: x: 3 is odd\n  at      a.yaml:2\n  allowed 2, 4\n  do      write 2"


def test_empty_lines_are_left_out_and_problems_are_listed_in_order():
    error = RecipeError([Problem("one"), Problem("two", do="mend it")])
    assert str(error) == "RecipeError: one\nRecipeError: two\n  do      mend it"
    with pytest.raises(ValueError, match="at least one problem"):
        RecipeError([])


def test_every_kind_has_its_own_exit_code():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MmftError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    assert codes == {
        "MmftError": 1,
        "RecipeError": 2,
        "DataError": 3,
        "CheckpointError": 4,
        "NonFiniteError": 5,
        "MemoryLimitError": 6,
        "BackboneError": 7,
        "AdapterError": 8,
        "ExportError": 9,
    }


def test_pickle_keeps_kind_and_problems():
    error = errors.DataError("row", where="f:1", do="mend")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.DataError and again.problems == error.problems and str(again) == str(error)


@pytest.mark.parametrize(
    ("word", "found"),
    [("visoin", "vision"), ("LANGUAGE", "language"), ("projecter", "projector"), ("zzzz", None)],
)
def test_nearest(word, found):
    assert nearest(word, ["vision", "language", "projector"]) == found


def test_choices_names_the_nearest():
    assert choices(["a", "bee"], word="be") == "a, bee   (nearest: 'bee')"
    assert choices(["a", "bee"]) == "a, bee"
