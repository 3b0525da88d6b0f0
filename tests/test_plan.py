"""`mmft plan`: what it foretells is what a run then does; the hub recipes plan without the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import mmft
from mmft.backbones.load import load_processor
from mmft.data.formats import load_all
from mmft.kinds.chat import make_renderer
from mmft.recipe.load import load_recipe
from tests.runs import REPOSITORY, cli, finished

HUB = ("smolvlm_vqa_qlora", "qwen2_5_vl_lora", "llava_captioning_lora", "mllama_cross_attention_lora")
PLANNED = [
    "smolvlm_vqa_qlora",
    "mllama_cross_attention_lora",
    pytest.param("qwen2_5_vl_lora", marks=pytest.mark.slow),
    pytest.param("llava_captioning_lora", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind", ["plain", "nf4", "full"])
def test_a_plan_counts_what_the_run_trains(kind: str) -> None:
    done, plan = finished(kind), mmft.plan(finished(kind).recipe)
    facts = done.report["training"]
    assert sum(part["trainable"] for part in plan["parts"]) == facts["trainable"]
    assert plan["targets"] == facts["parts"]
    assert plan["steps"] == {
        "total": facts["steps"],
        "rows_per_step": facts["rows_per_step"],
        "epochs": facts["epochs"],
    }
    assert plan["data"] == {"train": facts["rows"], "held": 8}
    assert plan["notes"] == []


def test_a_plan_measures_rows_as_they_are_rendered() -> None:
    recipe = load_recipe(finished().recipe)
    renderer = make_renderer(recipe, load_processor(recipe.model))
    rendered = [renderer.render(sample) for sample in load_all(recipe.data.train, recipe.data, 0)]
    tokens = mmft.plan(finished().recipe)["tokens"]
    assert tokens["all"]["max"] == max(len(row.input_ids) for row in rendered)
    assert tokens["image"]["max"] == tokens["image"]["p50"] == 16  # 32 x 32 pixels in patches of 8
    assert tokens["supervised"]["max"] == len("green") + 1  # a token per letter, and the end


def test_parameters_are_those_of_the_folder() -> None:
    from safetensors.torch import load_file

    from tests.runs import model

    plan = mmft.plan(finished().recipe)
    stored = sum(tensor.numel() for tensor in load_file(model() / "model.safetensors").values())
    assert sum(part["parameters"] for part in plan["parts"]) == stored
    assert plan["memory"]["weights"] == 4 * stored
    assert plan["memory"]["total"] == sum(size for owner, size in plan["memory"].items() if owner != "total")


def _recipe(name: str) -> Path:
    return REPOSITORY / "recipes" / f"{name}.yaml"


@pytest.mark.parametrize("name", HUB)
def test_hub_recipes_are_valid(name: str) -> None:
    values = mmft.validate(_recipe(name))
    assert values["model"]["model_type"] is not None
    assert all(Path(source["path"]).is_absolute() for source in values["data"]["train"])


@pytest.mark.parametrize("name", PLANNED)
def test_hub_recipes_plan_without_the_hub_and_say_so(name: str) -> None:
    outcome = cli("plan", _recipe(name), "--json")
    assert outcome.code == 0, outcome.err
    plan = outcome.json()
    assert any("cannot be reached: sizes are the defaults of" in note for note in plan["notes"])
    targets = set(mmft.validate(_recipe(name))["adapter"]["targets"])
    trained = {part["part"] for part in plan["parts"] if part["trainable"]}
    assert trained == {target.split(".")[0] for target in targets}
    assert plan["memory"]["total"] > plan["memory"]["weights"] > 0
