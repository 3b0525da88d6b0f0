"""Selectors: what they hit is what the names say, layer by layer."""

from __future__ import annotations

import pytest

from mmft.backbones.parts import Parts, find_parts
from mmft.backbones.selectors import drop, experts, homes, layer_numbers, select, selectors
from mmft.errors import AdapterError
from tests.tiny import tiny_vlm


@pytest.fixture(scope="module")
def llava() -> Parts:
    return find_parts(tiny_vlm("llava")[0])


@pytest.fixture(scope="module")
def mllama() -> Parts:
    return find_parts(tiny_vlm("mllama")[0])


def test_every_offered_selector_hits_and_the_parts_cover_everything(llava: Parts) -> None:
    for text in selectors(llava):
        assert select(llava, text)
    every = [name for part in llava.names for name in select(llava, part)] if llava.names else []
    assert sorted(every) == sorted(llava.linear)
    assert select(llava, "all-linear") == select(llava, "language")
    assert homes(llava, "language") == [("language", "attention"), ("language", "mlp")]
    assert select(llava, "vision.mlp") == [
        f"model.vision_tower.encoder.layers.{i}.mlp.{fc}" for i in (0, 1) for fc in ("fc1", "fc2")
    ]


@pytest.mark.parametrize(
    ("layers", "kept"), [("last:1", {2}), ("first:2", {0, 1}), ("0-1", {0, 1}), ("0,2", {0, 2}), ("last:9", {0, 1, 2})]
)
def test_layers_are_numbered_through_a_stack_of_two_parts(mllama: Parts, layers: str, kept: set[int]) -> None:
    """Layer 1 of three is the cross-attention layer."""
    top = "model.language_model.layers"
    for part, own in (("language", {0, 2}), ("cross_attention", {1})):
        if not kept & own:
            with pytest.raises(AdapterError, match=f"nothing is left of target '{part}'"):
                select(mllama, part, layers=layers)
            continue
        found = select(mllama, part, layers=layers)
        assert found == [n for n in mllama.linears(part) if int(n.removeprefix(f"{top}.")[0]) in kept]
    numbers = layer_numbers(mllama)
    assert {stack for stack, _ in numbers.values()} >= {top, "model.vision_model.transformer.layers"}
    assert numbers[f"{top}.2.mlp.up_proj"] == (top, 2) and "lm_head" not in numbers


def test_projector_and_head_have_no_layers(llava: Parts) -> None:
    assert select(llava, "projector", layers="last:1") == select(llava, "projector")
    assert select(llava, "head", layers="first:1") == ["lm_head"]


def test_exclusions(llava: Parts) -> None:
    names = select(llava, "language") + select(llava, "vision")
    assert drop(llava, names, ["vision"]) == select(llava, "language")
    assert drop(llava, names, ["language.attention", "vision"]) == select(llava, "language.mlp")
    assert all("layers.0." not in name for name in drop(llava, names, ["layers.0"]))
    assert all(not name.endswith("q_proj") for name in drop(llava, names, ["q_proj"]))
    assert drop(llava, names, ["model.vision_tower.*"]) == select(llava, "language")


def test_messages(llava: Parts) -> None:
    with pytest.raises(AdapterError, match="layers: last is not understood") as caught:
        select(llava, "language", layers="last")
    assert "allowed last:8, first:4, or numbers from 0 such as 0-3,7" in str(caught.value)
    with pytest.raises(AdapterError, match="no layer is meant by layers: 7") as caught:
        select(llava, "language", layers="7")
    assert "this model has layers 0 to 1 there" in str(caught.value)
    with pytest.raises(AdapterError, match="exclude 'audio' matches nothing in this model"):
        select(llava, "language", exclude=["audio"])
    with pytest.raises(AdapterError, match=r"exclude 'q_prj' matches nothing"):
        select(llava, "language", exclude=["q_prj"])
    with pytest.raises(AdapterError, match=r"nothing is left of target 'language' \(14 linear layers\)"):
        select(llava, "language", exclude=["language"])


def test_stacked_experts_are_told_apart() -> None:
    from mmft.backbones.load import meta_model

    parts = find_parts(meta_model("qwen3_vl_moe"))
    assert select(parts, "language.mlp") == []
    assert experts(parts, "language.mlp") == list(parts.experts) == experts(parts, "all-linear")
