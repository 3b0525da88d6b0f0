from __future__ import annotations

import pytest

from mmft.errors import RecipeError
from mmft.recipe.load import load_recipe

GOOD = "model: shipped:nano-vlm\ndata:\n  train: rows.jsonl\n"


@pytest.fixture
def good() -> str:
    return GOOD


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(text, *overrides)`: the recipe of a file r.yaml beside rows.jsonl, the working folder being the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "held.jsonl").write_text("{}\n")

    def inner(text, *overrides):
        (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe("r.yaml", overrides)

    return inner


@pytest.fixture
def fails(load):
    """`fails(text, *overrides)`: the text of the RecipeError."""

    def inner(text, *overrides):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return inner
