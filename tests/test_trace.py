"""`mmft trace`: ten stations in order, each with the line of the code that does it, the same at every call."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

import pytest
import torch

import mmft
from mmft.backbones.load import load_processor
from mmft.data.formats import load_all
from mmft.errors import RecipeError
from mmft.kinds.chat import make_renderer
from mmft.recipe.load import load_recipe
from tests.runs import REPOSITORY, finished, workshop, write_recipe

FUNCTIONS = {
    "1 formats": "load_all",
    "2 audit": "fingerprint",
    "3 order": "micro_batches",
    "4 media": "open_image",
    "5 render": "render",
    "6 collate": "collate",
    "7 objective": "loss",
    "8 loop": "fit",
    "9 store": "save_adapter",
    "10 merge": "merge_adapter",
}


@functools.cache
def _recipe() -> Path:
    return write_recipe(workshop() / "trace")


@functools.cache
def _stations() -> tuple[dict[str, str], ...]:
    return tuple(mmft.trace(_recipe(), row=3))


def _one(name: str) -> dict[str, str]:
    return next(station for station in _stations() if station["station"] == name)


def test_ten_stations_in_order() -> None:
    names = list(dict.fromkeys(station["station"] for station in _stations()))
    assert names == list(FUNCTIONS)
    numbers = [int(station["station"].split()[0]) for station in _stations()]
    assert numbers == sorted(numbers)


def test_every_station_names_the_line_where_its_function_begins() -> None:
    for station in _stations():
        file, _, line = station["code"].rpartition(":")
        tree = ast.parse((REPOSITORY / file).read_text())
        found = [
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _begin(node) == int(line)
        ]
        assert found == [FUNCTIONS[station["station"]]], station


def _begin(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def test_digests_are_those_of_the_values_and_equal_on_a_second_call() -> None:
    assert mmft.trace(_recipe(), row=3) == list(_stations())
    recipe = load_recipe(_recipe())
    sample = load_all(recipe.data.train, recipe.data, 0)[3]
    rendered = make_renderer(recipe, load_processor(recipe.model)).render(sample)
    values = torch.stack([rendered.input_ids, rendered.labels]).numpy().tobytes()
    assert _one("5 render")["digest"] == hashlib.sha256(values).hexdigest()[:12]
    assert _one("5 render")["shape"] == str(tuple(rendered.input_ids.shape))
    other = mmft.trace(_recipe(), row=4)
    assert next(s for s in other if s["station"] == "5 render")["digest"] != _one("5 render")["digest"]


def test_what_it_says_of_the_model_is_what_a_run_does() -> None:
    facts = finished().report["training"]
    assert f"{facts['trainable']:,} values" == _one("9 store")["shape"]
    touched = finished().report["merge"]["tensors"] - finished().report["merge"]["untouched"]
    assert f"{touched} modules" == _one("10 merge")["shape"]
    assert _one("8 loop")["shape"] == "0 frozen with gradient"
    assert "language" in _one("8 loop")["what"] and "projector" in _one("8 loop")["what"]


def test_nothing_is_written_and_a_row_that_is_not_there_is_refused() -> None:
    assert [path.name for path in _recipe().parent.iterdir()] == ["recipe.yaml"]
    with pytest.raises(RecipeError, match="row 16 does not exist"):
        mmft.trace(_recipe(), row=16)
