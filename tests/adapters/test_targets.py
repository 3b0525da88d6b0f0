"""Targets: exact names, and messages for what matches nothing."""

from __future__ import annotations

from typing import Any

import pytest

from mmft.adapters.targets import resolve_targets
from mmft.backbones.load import meta_model
from mmft.backbones.parts import Parts, find_parts
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection
from tests.tiny import tiny_vlm


@pytest.fixture(scope="module")
def parts() -> Parts:
    return find_parts(tiny_vlm("llava")[0])


def resolve(model_parts: Parts, /, **values: Any) -> dict[tuple[str, str, str], int]:
    found = resolve_targets(model_parts, AdapterSection.model_validate(values))
    return {(t.part, t.sub, t.mode): len(t.modules) for t in found}


def test_what_targets_mean(parts: Parts) -> None:
    both = {("language", "attention", "lora"): 8, ("language", "mlp", "lora"): 6}
    assert resolve(parts) == both
    assert resolve(parts, targets=["all-linear"]) == both
    assert resolve(parts, targets=["language", "language.mlp"]) == both
    assert resolve(parts, targets=["vision.attention", "projector"]) == {
        ("vision", "attention", "lora"): 8,
        ("projector", "other", "lora"): 2,
    }
    found = resolve_targets(parts, AdapterSection(targets=("projector",)))
    assert found[0].modules == ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")


def test_modes(parts: Parts) -> None:
    frozen = {"language": {"mode": "frozen"}}
    assert resolve(parts, targets=["language", "projector"], parts=frozen) == {("projector", "other", "lora"): 2}
    full = {"projector": {"mode": "full"}}
    found = resolve(parts, targets=["language.mlp"], parts=full)
    assert found == {("projector", "other", "full"): 0, ("language", "mlp", "lora"): 6}
    assert ("vision", "norm", "full") in resolve(parts, method="full", targets=["vision"])
    with pytest.raises(AdapterError, match="nothing is trained"):
        resolve(parts, targets=["projector"], parts={"projector": {"mode": "frozen"}})


def test_the_message_for_a_target_that_matches_nothing(parts: Parts) -> None:
    with pytest.raises(AdapterError) as caught:
        resolve(parts, targets=["language.attention", "projecter"])
    assert str(caught.value) == (
        "AdapterError: target 'projecter' matches nothing: this model has no part 'projecter'\n"
        "  at      adapter.targets[1]\n"
        "  allowed all-linear, vision, vision.attention, vision.mlp, projector, projector.other, language, "
        "language.attention, language.mlp, head, head.other   (nearest: 'projector')\n"
        "  do      run mmft inspect to see the parts"
    )
    assert caught.value.exit_code == 8
    with pytest.raises(AdapterError, match=r"target 'language.norm' matches nothing in this model \(no linear layers"):
        resolve(parts, targets=["language.norm"])
    with pytest.raises(AdapterError, match="this model has no part 'audio'"):
        resolve(parts, parts={"audio": {"mode": "full"}})
    with pytest.raises(AdapterError, match="part 'vision' has settings but is not trained"):
        resolve(parts, parts={"vision": {"learning_rate": 1e-5}})


def test_experts_are_refused_with_the_reason() -> None:
    parts = find_parts(meta_model("qwen3_vl_moe"))
    with pytest.raises(AdapterError, match="three-dimensional weight") as caught:
        resolve(parts)
    assert "do      target language.attention instead" in str(caught.value)
    for text in ("language.mlp", "language", "all-linear"):
        with pytest.raises(AdapterError, match="holds experts"):
            resolve(parts, targets=[text])
    assert resolve(parts, targets=["language.attention"])
