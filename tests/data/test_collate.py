"""Padding and joining: models give each row the same logits alone and in a batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

from mmft.data.collate import collate
from mmft.data.render import IGNORED, Rendered, Renderer
from tests.data.small import processor, sample, tokenizer

ROWS = [
    sample("What is it?", "a cat", id="one"),
    sample("Where is the dog?", "top left", "And the cat?", "right", seed=1, size=(60, 20), id="two"),
    sample("hello", "yes there", images=0, id="text"),
    sample("How many pictures are there?", "2", images=2, seed=2, size=(20, 60), id="pair"),
]


def rendered(kind: str) -> list[Rendered]:
    renderer = Renderer(processor(kind), max_length=4096)
    return [renderer.render(row) for row in ROWS]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_vl", "mllama"])
def test_sequences_are_padded_and_counts_are_true(kind, side):
    rows = rendered(kind)
    batch = collate(rows, pad_token_id=0, side=side)
    width = max(len(row.input_ids) for row in rows)
    assert batch.labels.shape == batch.inputs["input_ids"].shape == batch.inputs["attention_mask"].shape == (4, width)
    assert "labels" not in batch.inputs and batch.ids == ("one", "two", "text", "pair")
    for k, row in enumerate(rows):
        n = len(row.input_ids)
        real = slice(0, n) if side == "right" else slice(width - n, width)
        rest = slice(n, width) if side == "right" else slice(0, width - n)
        assert torch.equal(batch.inputs["input_ids"][k, real], row.input_ids)
        assert torch.equal(batch.labels[k, real], row.labels)
        assert bool((batch.inputs["input_ids"][k, rest] == 0).all() and (batch.labels[k, rest] == IGNORED).all())
        assert (
            batch.inputs["attention_mask"][k].tolist().count(1)
            == n
            == int(batch.inputs["attention_mask"][k, real].sum())
        )
        for name in ("mm_token_type_ids", "cross_attention_mask"):
            if name in row.media:
                value, own = batch.inputs[name][k, real], row.media[name][0]
                inner = tuple(slice(0, size) for size in own.shape)
                assert torch.equal(value[inner], own) and int(value.sum()) == int(own.sum())
                assert not bool(batch.inputs[name][k, rest].any())
    assert batch.supervised == sum(int((row.labels[1:] != IGNORED).sum()) for row in rows)
    assert batch.tokens == sum(len(row.input_ids) for row in rows)
    assert batch.tokens + batch.padding == 4 * width


def test_layouts():
    shapes = {kind: {k: tuple(v.shape) for k, v in collate(rendered(kind), pad_token_id=0).inputs.items()} for kind in
              ("llava", "idefics3", "qwen2_vl", "mllama")}  # fmt: skip
    assert shapes["llava"]["pixel_values"] == (4, 3, 192, 192)  # 1 + 1 + 0 + 2 pictures
    assert shapes["idefics3"]["pixel_values"][0] == 4  # rows
    assert shapes["idefics3"]["pixel_attention_mask"][:2] == shapes["idefics3"]["pixel_values"][:2]
    assert shapes["qwen2_vl"]["image_grid_thw"] == (4, 3)
    assert shapes["mllama"]["pixel_values"] == (4, 2, 4, 3, 32, 32)
    assert shapes["mllama"]["aspect_ratio_ids"] == (4, 2)
    assert shapes["mllama"]["cross_attention_mask"] == (4, shapes["mllama"]["input_ids"][1], 2, 4)


def text_config() -> dict:
    return dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=len(tokenizer()), max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def model(kind: str):
    torch.manual_seed(0)
    image_token = processor(kind).image_token_id
    if kind == "llava":
        vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=2, image_size=192, patch_size=32)  # fmt: skip
        config = LlavaConfig(
            vision_config=vision, text_config=dict(model_type="llama", **text_config()), image_token_index=image_token,
            vision_feature_select_strategy="default", vision_feature_layer=-1,
        )  # fmt: skip
        return LlavaForConditionalGeneration(config).eval()
    if kind == "idefics3":
        vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                      image_size=32, patch_size=8)  # fmt: skip
        config = Idefics3Config(
            vision_config=vision, text_config=dict(model_type="llama", **text_config()), image_token_id=image_token,
            scale_factor=2, pad_token_id=0,
        )  # fmt: skip
        return Idefics3ForConditionalGeneration(config).eval()
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_global_layers=1, attention_heads=2,
                  image_size=32, patch_size=16, max_num_tiles=4, vision_output_dim=64,
                  intermediate_layers_indices=[0])  # fmt: skip
    text = text_config() | {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    return MllamaForConditionalGeneration(
        MllamaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    ).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llava", "idefics3", "mllama"])
def test_a_row_has_the_same_logits_alone_and_in_a_batch(kind, side):
    network, rows = model(kind), rendered(kind)
    batch = collate(rows, pad_token_id=0, side=side)
    positions = {}
    if side == "left":  # generate() derives these from the mask
        positions["position_ids"] = (batch.inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = network(**batch.inputs, **positions).logits
        for k, row in enumerate(rows):
            alone = network(**collate([row], pad_token_id=0).inputs).logits[0]
            real = batch.inputs["attention_mask"][k].bool()
            assert torch.allclose(together[k][real], alone, atol=2e-5), (kind, row.id)


def test_text_only_batches_have_no_media():
    rows = [row for row in rendered("mllama") if row.id == "text"] * 2
    assert set(collate(rows, pad_token_id=0).inputs) == {"input_ids", "attention_mask"}


def test_deterministic():
    rows = rendered("idefics3")
    first, second = (collate(rows, pad_token_id=0) for _ in range(2))
    assert all(torch.equal(first.inputs[name], second.inputs[name]) for name in first.inputs)


def test_sizes_that_differ_are_padded_with_zeros():
    row = rendered("llava")[0]
    big = dataclasses.replace(row, media={"pixel_values": torch.ones(1, 2, 3)})
    small = dataclasses.replace(row, media={"pixel_values": torch.ones(2, 1, 4)})
    out = collate([big, small], pad_token_id=0).inputs["pixel_values"]
    assert out.shape == (3, 2, 4) and int(out.sum()) == 6 + 8 and not bool(out[1:, 1:].any() or out[0, :, 3:].any())


def test_to_moves_everything():
    batch = collate(rendered("mllama"), pad_token_id=0).to("meta")
    assert {value.device.type for value in [*batch.inputs.values(), batch.labels]} == {"meta"}


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        collate([], pad_token_id=0)
