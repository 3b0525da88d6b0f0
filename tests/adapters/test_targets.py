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


def test_experts_are_named_or_refused_with_the_reason() -> None:
    parts = find_parts(meta_model("qwen3_vl_moe"))
    found = {(t.part, t.sub): t for t in resolve_targets(parts, AdapterSection())}
    stacks = found["language", "mlp"].parameters
    assert len(stacks) == len(parts.experts) and all(name.endswith("_proj") for name in stacks)
    assert not found["language", "attention"].parameters
    for values, reason in (
        ({"method": "vera"}, "method vera cannot sit on it"),
        ({"use_dora": True}, "peft has no DoRA for it"),
        ({"lora_dropout": 0.1}, "peft has no dropout for it"),
        ({"init_lora_weights": "pissa"}, "needs a matrix"),
    ):
        with pytest.raises(AdapterError, match=reason) as caught:
            resolve(parts, **values)
        assert "stored as one three-dimensional weight" in str(caught.value)
        assert "do      target language.attention instead" in str(caught.value)
        assert resolve(parts, targets=["language.attention"], **values)


def test_layers_and_exclusions(parts: Parts) -> None:
    last = resolve_targets(parts, AdapterSection(targets=("language", "projector"), layers="last:1"))
    names = [name for target in last for name in target.modules]
    assert len(names) == 2 + 7 and all(".layers.1." in name or "projector" in name for name in names)
    assert resolve(parts, targets=["language", "projector"], exclude=["language.mlp", "q_proj"]) == {
        ("projector", "other", "lora"): 2,
        ("language", "attention", "lora"): 6,
    }
    with pytest.raises(AdapterError, match="exclude 'nothing' matches nothing"):
        resolve(parts, exclude=["nothing"])
    with pytest.raises(AdapterError, match="no layer is meant by layers: 7-9"):
        resolve(parts, layers="7-9")


def test_modules_that_are_saved_whole(parts: Parts) -> None:
    found = {
        (t.part, t.sub, t.mode): t.modules
        for t in resolve_targets(parts, AdapterSection(modules_to_save=("projector", "lm_head")))
    }
    assert found["projector", "other", "full"] == () and found["head", "other", "full"] == ("lm_head",)
    assert ("language", "mlp", "lora") in found
    with pytest.raises(AdapterError, match="module 'lm_heed' is not in this model"):
        resolve(parts, modules_to_save=["lm_heed"])


def test_prompts_have_one_target(parts: Parts) -> None:
    assert resolve(parts, method="prompt") == {("language", "embedding", "lora"): 0}
    assert resolve(parts, method="ln_tuning", targets=["language", "vision.norm"]) == {
        ("vision", "norm", "lora"): 0,
        ("language", "norm", "lora"): 0,
    }
