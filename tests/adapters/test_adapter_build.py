"""Adapters sit exactly where they were named, start where the seed says, and leave the rest bit-equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmft.adapters.build import Adapted, build_adapters, lora_layers, set_modes
from mmft.backbones.load import Backbone, load_backbone
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection, ModelSection
from tests.tiny import WORKING, save_tiny_vlm, tiny_inputs


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {kind: save_tiny_vlm(root / kind, kind) for kind in WORKING}
    found["tied"] = save_tiny_vlm(root / "tied", "llava", tie=True)
    return found


def load(folder: Path, dtype: str = "float32") -> Backbone:
    return load_backbone(ModelSection.model_validate({"name_or_path": str(folder), "dtype": dtype}))


def build(folder: Path, *, seed: int = 0, dtype: str = "float32", **values: Any) -> Adapted:
    return build_adapters(load(folder, dtype), AdapterSection.model_validate(values), seed=seed)


def step(adapted: Adapted, kind: str) -> None:
    set_modes(adapted)
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=0.05, weight_decay=0.1)
    for _ in range(2):  # with B at zero, A has no gradient in the first step
        optimizer.zero_grad()
        adapted.model(**tiny_inputs(kind)).logits.float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", WORKING)
def test_only_what_is_named_is_trained_and_the_rest_stays_bit_equal(kind: str, folders: dict[str, Path]) -> None:
    adapted = build(folders[kind], targets=["language.attention", "projector"], lora_rank=2, lora_dropout=0.1)
    wanted = [name for target in adapted.targets for name in target.modules]
    assert sorted(lora_layers(adapted.model)) == sorted(wanted)
    assert {name.rsplit(".lora_", 1)[0].removeprefix("base_model.model.") for name in adapted.trainable()} == set(
        wanted
    )
    before = {name: value.clone() for name, value in adapted.model.state_dict().items()}
    step(adapted, kind)
    after = adapted.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(adapted.trainable())  # BatchNorm's running statistics are in the state, too
    assert [group.part for group in adapted.groups] == ["projector", "language"]
    assert sorted(name for group in adapted.groups for name in group.names) == list(adapted.trainable())
    assert sum(int(row[4].replace(",", "")) for row in adapted.table()) == sum(
        p.numel() for p in adapted.trainable().values()
    )


def test_each_module_gets_the_rank_and_scale_of_its_part(folders: dict[str, Path]) -> None:
    settings = {
        "projector": {"lora_rank": 3, "lora_alpha": 12.0, "learning_rate": 1e-3},
        "vision": {"lora_rank": 5},
    }
    for use_rslora in (False, True):
        adapted = build(
            folders["llava"],
            targets=["language", "projector", "vision"],
            lora_rank=4,
            lora_alpha=8.0,
            use_rslora=use_rslora,
            parts=settings,
        )
        expected = {"projector": (3, 12.0), "vision": (5, 8.0), "language": (4, 8.0)}
        for name, layer in lora_layers(adapted.model).items():
            rank, alpha = expected[adapted.backbone.parts.part_of(name)]
            assert layer.r["default"] == rank
            assert layer.scaling["default"] == pytest.approx(alpha / (rank**0.5 if use_rslora else rank))
            assert layer.lora_A["default"].weight.shape[0] == rank
        assert {group.part: group.learning_rate for group in adapted.groups} == {
            "vision": None,
            "projector": 1e-3,
            "language": None,
        }


def test_the_start_depends_on_seed_and_name_only(folders: dict[str, Path]) -> None:
    torch.manual_seed(1)
    first = build(folders["llava"], seed=7)
    state = torch.get_rng_state()
    other = build(folders["llava"], seed=7, targets=["projector", "language.attention", "language.mlp"])
    assert torch.equal(state, torch.get_rng_state())
    seeded = build(folders["llava"], seed=8)
    for name, value in first.trainable().items():
        assert torch.equal(value, other.trainable()[name])
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert value.abs().max() <= value.shape[1] ** -0.5
            assert value.detach().std().item() == pytest.approx((value.shape[1] * 3) ** -0.5, rel=0.15)
            assert not torch.equal(value, seeded.trainable()[name])
    values = [value for name, value in first.trainable().items() if "q_proj.lora_A" in name]
    assert not torch.equal(values[0], values[1])


def test_a_fresh_adapter_changes_nothing_and_is_float32(folders: dict[str, Path]) -> None:
    plain = load(folders["llava"], "bfloat16")
    adapted = build(folders["llava"], dtype="bfloat16", targets=["all-linear", "vision"])
    inputs = tiny_inputs("llava")
    with torch.no_grad():
        assert torch.equal(plain.model(**inputs).logits, adapted.model.eval()(**inputs).logits)
    assert {value.dtype for value in adapted.trainable().values()} == {torch.float32}
    assert {p.dtype for p in adapted.model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "mllama", "fast_vlm"])
@pytest.mark.parametrize("part", ["vision", "projector"])
def test_a_part_in_full_beside_lora(kind: str, part: str, folders: dict[str, Path]) -> None:
    adapted = build(folders[kind], targets=["language.mlp"], lora_rank=2, parts={part: {"mode": "full"}})
    own = [
        n for n, _ in adapted.backbone.model.named_parameters() if adapted.home(n)[0] == part and "original" not in n
    ]
    trained = [name for name in adapted.trainable() if adapted.home(name)[0] == part]
    assert trained and all(".modules_to_save.default." in name for name in trained)
    assert len(trained) + len([n for n in own if "modules_to_save" not in n]) == len(own)
    before = {name: value.clone() for name, value in adapted.trainable().items()}
    step(adapted, kind)
    moved = [name for name in trained if not torch.equal(before[name], adapted.trainable()[name])]
    assert len(moved) > len(trained) // 2


def test_full_training_of_chosen_parts(folders: dict[str, Path]) -> None:
    adapted = build(folders["llava"], method="full", targets=["projector", "language.mlp"])
    names = set(adapted.trainable())
    assert names == {
        name
        for name, _ in adapted.model.named_parameters()
        if "multi_modal_projector" in name or ("language_model" in name and ".mlp." in name)
    }
    set_modes(adapted)
    assert adapted.model.model.language_model.layers[0].training
    assert not adapted.model.model.vision_tower.training
    tied = build(folders["tied"], method="full", targets=["language.embedding"])
    assert list(tied.trainable()) == ["model.language_model.embed_tokens.weight"]


def test_tied_heads_are_trained_on_both_sides_or_not_at_all(folders: dict[str, Path]) -> None:
    for values in ({"targets": ["head"]}, {"targets": ["projector"], "parts": {"language": {"mode": "full"}}}):
        with pytest.raises(AdapterError, match="shares between its input and its head"):
            build(folders["tied"], **values)
    with pytest.raises(AdapterError, match="hold no weights of their own"):
        build(folders["tied"], method="full", targets=["head"])
    assert build(folders["llava"], targets=["head"]).trainable()
    with pytest.raises(AdapterError, match="there is no adapter"):
        build(folders["llava"], targets=["projector"], parts={"projector": {"mode": "full"}})


def test_modes_of_frozen_towers_and_recomputing_layers(folders: dict[str, Path]) -> None:
    adapted = build(folders["fast_vlm"], lora_dropout=0.5)
    adapted.model.train()
    set_modes(adapted)
    norms = [m for m in adapted.model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms and not any(m.training for m in norms)
    assert all(layer.lora_dropout["default"].training for layer in lora_layers(adapted.model).values())
    layer = adapted.backbone.model.model.language_model.layers[0]
    assert not layer.training
    adapted.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    set_modes(adapted)
    assert layer.training and not layer.self_attn.training  # recomputed, its base without dropout


def test_recomputation_gives_the_same_gradients_and_no_input_gradient(folders: dict[str, Path]) -> None:
    adapted = build(folders["llava"], targets=["language.mlp"])
    for name, value in adapted.trainable().items():
        if ".lora_B." in name:
            value.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    found = []
    for recompute in (False, True):
        if recompute:
            adapted.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        set_modes(adapted)
        adapted.model.zero_grad()
        adapted.model(**tiny_inputs("llava")).logits.square().mean().backward()
        found.append({name: value.grad.clone() for name, value in adapted.trainable().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(p.requires_grad for p in adapted.backbone.model.model.vision_tower.parameters())
