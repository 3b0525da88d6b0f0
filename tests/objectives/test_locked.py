"""Towers that are not trained remember their features: the same bits, fewer forwards, refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import mmft
from mmft.adapters.build import build_adapters, set_modes
from mmft.backbones.load import load_backbone
from mmft.errors import RecipeError
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.kinds.pairs import remember
from mmft.objectives.contrastive_embed import embed
from mmft.objectives.contrastive_locked import address, lock_towers
from mmft.recipe.load import load_recipe
from mmft.stages import load_datasets
from tests.objectives.pairs import values
from tests.runs import adapter_sha, read_lines

LOCKED = {"adapter.targets": ["vision.attention", "vision.mlp"], "objective.cache_features": True}
NO_MERGE = {"data.eval": [], "export.merge": False}


def _dual(tmp_path, kind: str = "dual"):
    recipe = load_recipe(values(tmp_path, {"adapter.targets": ["vision.attention"]}, kind=kind))
    backbone = load_backbone(recipe.model)
    adapted = build_adapters(backbone, recipe.adapter, seed=0)
    set_modes(adapted)
    return adapted, kind_of(recipe).renderer(recipe, backbone.processor)


def test_every_row_has_the_bits_it_has_alone(tmp_path):
    adapted, renderer = _dual(tmp_path)
    texts = ["red", "a green square", "red", "not blue"]
    base = adapted.model.get_base_model()

    def states(chosen: list[str]) -> torch.Tensor:
        """The tower's own output; a projection behind it is computed for the batch."""
        return base.text_model(**renderer.encode_texts(chosen)).pooler_output

    alone = torch.cat([states([text]) for text in texts])
    towers = lock_towers(adapted.model)
    assert [tower.side for tower in towers] == ["text"]
    assert torch.equal(states(texts), alone) and torch.equal(states(texts[::-1]).flip(0), alone)
    assert (towers[0].misses, towers[0].hits) == (3, 5)
    remembered = embed(adapted.model, renderer.encode_texts(texts), "text")
    towers[0].release()
    plain = embed(adapted.model, renderer.encode_texts(texts), "text")
    assert torch.allclose(plain, remembered, atol=1e-6) and (towers[0].misses, towers[0].hits) == (3, 9)


def test_memory_has_a_bound(tmp_path):
    adapted, renderer = _dual(tmp_path)
    width = adapted.backbone.model.text_model.config.hidden_size
    tower = lock_towers(adapted.model, bound=2 * 2 * 4 * width + 8)[0]
    texts = ["red", "green", "blue"]
    first = embed(adapted.model, renderer.encode_texts(texts), "text")
    assert tower.bytes == 2 * 2 * 4 * width and len(tower._kept) == 2
    assert torch.equal(embed(adapted.model, renderer.encode_texts(texts), "text"), first)


def test_an_address_is_the_content_in_its_precision():
    row = {"pixel_values": torch.ones(1, 3, 2, 2)}
    changed = {"pixel_values": torch.ones(1, 3, 2, 2).index_fill(3, torch.tensor([1]), 0.5)}
    assert address(row) == address({"pixel_values": torch.ones(1, 3, 2, 2)}) != address(changed)
    assert address(row) != address({"pixel_values": torch.ones(1, 3, 4, 1)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = address(row)
    assert inside != address(row)


def test_a_run_with_memory_is_the_run_without(tmp_path):
    losses, tensors = [], []
    for name, changes in (("plain", {"objective.cache_features": False}), ("locked", {})):
        recipe = values(tmp_path / name, {**LOCKED, **NO_MERGE, "adapter.lora_dropout": 0.0, **changes})
        mmft.train(recipe, quiet=True)
        run = tmp_path / name / "runs" / "pairs"
        losses.append([row["loss"] for row in read_lines(run / "metrics.jsonl")])
        tensors.append(load_file(run / "adapter" / "adapter_model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    differing = torch.cat([(tensors[0][name] - tensors[1][name]).abs().flatten() for name in tensors[0]])
    assert float((differing < 1e-4).float().mean()) > 0.999


def test_a_resumed_run_with_memory_ends_in_the_same_bytes(tmp_path):
    """The new process meets the rows in another order and has computed none of them."""
    import shutil

    recipe = values(tmp_path, {**LOCKED, **NO_MERGE, "objective.captions_per_image": 1})
    run = tmp_path / "runs" / "pairs"
    mmft.train(recipe, quiet=True)
    wanted = adapter_sha(run)
    for folder in (run / "adapter", run / "checkpoints" / "step-000004"):
        shutil.rmtree(folder)
    (run / "report.json").unlink()
    mmft.train(recipe, resume=True, quiet=True)
    assert adapter_sha(run) == wanted


def test_it_is_refused_where_every_tower_is_trained(tmp_path):
    with pytest.raises(RecipeError, match=r"every tower is trained \(image: 24 tensors, such as .*; text: "):
        mmft.train(values(tmp_path, {**NO_MERGE, "objective.cache_features": True}), quiet=True)


def _kept_towers(tmp_path, changes=None):
    recipe = load_recipe(values(tmp_path, {**LOCKED, **NO_MERGE, **(changes or {})}))
    backbone = load_backbone(recipe.model)
    datasets = load_datasets(recipe, backbone.processor, Journal(None, quiet=True))
    adapted = build_adapters(backbone, recipe.adapter, seed=0)
    return adapted, datasets, recipe


def test_a_later_run_finds_what_an_earlier_one_kept(tmp_path, monkeypatch):
    """On disk, by the tower's weights: the same bits, and nothing computed but what is new."""
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    texts = ["red", "a green square", "not blue"]
    found = []
    for changed in (False, False, True):
        adapted, datasets, recipe = _kept_towers(tmp_path)
        if changed:
            next(adapted.backbone.model.text_model.parameters()).data.flatten()[0] += 1.0
        (tower,) = remember(adapted, datasets, recipe)
        before = tower.misses
        found.append(
            (embed(adapted.model, datasets.renderer.encode_texts(texts), "text"), before, tower.misses - before)
        )
        assert tower.side == "text" and len(list((tmp_path / "cache").rglob("*.slab"))) > 0
        plain = tower._forward(**datasets.renderer.encode_texts(texts[:1])).pooler_output
        assert torch.equal(tower(**datasets.renderer.encode_texts(texts[:1])).pooler_output, plain)
    (first, *cold), (second, *warm), (_, *other) = found
    assert torch.equal(first, second) and cold == [1, 2] and warm == [0, 0] and other == [1, 2]


def test_pictures_that_change_are_not_kept_beyond_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    text = {"adapter.targets": ["language.attention"]}
    for more, kept in (({}, True), ({"data.augmentation": {"horizontal_flip": 0.5}}, False)):
        adapted, datasets, recipe = _kept_towers(tmp_path, {**text, **more})
        (tower,) = remember(adapted, datasets, recipe)
        assert tower.side == "image" and (tower.disk is not None) == kept


def test_plan_tells_of_the_store(tmp_path):
    reason = {}
    for on in (True, False):
        plan = mmft.plan(values(tmp_path, {**LOCKED, **NO_MERGE, "objective.cache_features": on}))
        reason[on] = next(row[2] for row in plan["fast"] if row[0] == "feature_store")
    assert "in the same store" in reason[True] and "a way of their own" in reason[False]


def test_a_key_is_of_the_tower_and_the_row(tmp_path):
    adapted, _ = _dual(tmp_path)
    (tower,) = lock_towers(adapted.model)
    keys = set()
    for space in ("a", "b"):
        tower.keep_on({}, space)  # type: ignore[arg-type]
        keys |= {tower._key(b"one"), tower._key(b"two")}
    assert len(keys) == 4
