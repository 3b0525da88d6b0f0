"""The joint objective against its formulas in float64, upstream's own forwards, and one batch against several."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from mmft.backbones.joint import SCALE, JointModel
from mmft.backbones.parts import find_parts
from mmft.data.collate import Batch
from mmft.data.pairs import EXTRA, LEFT, RIGHT
from mmft.errors import BackboneError
from mmft.objectives.base import StepContext, StepObjective
from mmft.objectives.joint import (
    JointObjective,
    Words,
    caption_count,
    draw_wrong,
    matching_count,
    partners,
    wrong_rows,
)
from mmft.objectives.joint_heads import heads_of
from mmft.seeds import fold
from tests.objectives.joints import tiny_blip, tiny_blip2, tiny_blip_joint, tiny_joint
from tests.tiny import SIDE

MODELS = {"joint": tiny_joint, "blip": tiny_blip, "blip_joint": tiny_blip_joint, "blip2": tiny_blip2}
CLASSES: dict[str, Any] = {
    "blip": transformers.BlipForImageTextRetrieval,
    "blip2": transformers.Blip2ForImageTextRetrieval,
}
LEFT_GROUPS, RIGHT_GROUPS = [5, 6, 5, 7], [5, 6, EXTRA, 5, 7, 7]


def load(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    cls = CLASSES.get(kind, transformers.AutoModel)
    return cls.from_pretrained(MODELS[kind]()).to(dtype).eval()


def batch(left: list[int] = LEFT_GROUPS, right: list[int] = RIGHT_GROUPS, *, seed: int = 0) -> Batch:
    """Random pictures and padded texts with the given groups."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [6 + 3 * (place % 3) for place in range(len(right))]
    ids = torch.randint(60, 280, (len(right), max(lengths)), generator=draw)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        ids[row, 0], ids[row, length - 1], ids[row, length:] = 1, 2, 0
    inputs = {
        "pixel_values": torch.randn(len(left), 3, SIDE, SIDE, generator=draw, dtype=torch.float64),
        "input_ids": ids,
        "attention_mask": mask,
        LEFT: torch.tensor(left),
        RIGHT: torch.tensor(right),
    }
    names = tuple(f"{seed}-{place}" for place in range(len(left)))
    return Batch(inputs, torch.zeros(0), names, len(left), int(mask.sum()), 0)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def step(count: float, micros: int) -> StepContext:
    return StepContext(count, tuple(range(micros)), lambda one: one, nullcontext)


# ---------------------------------------------------------------- who may be a wrong one, and how often


def test_texts_find_pictures_of_their_group_in_turn():
    pictures, texts = partners(torch.tensor(LEFT_GROUPS), torch.tensor(RIGHT_GROUPS))
    assert texts.tolist() == [0, 1, 3, 4, 5]
    assert pictures.tolist() == [0, 1, 2, 3, 3]


def test_only_other_groups_are_wrong():
    left, right = torch.tensor(LEFT_GROUPS), torch.tensor(RIGHT_GROUPS)
    logits = torch.zeros(4, 6)
    for seed in range(200):
        drawn = draw_wrong(logits, left, right, seed=seed)
        assert all(left[row] != right[column] for row, column in enumerate(drawn))
    alone = torch.tensor([3, 3])
    assert wrong_rows(alone, torch.tensor([3, 3]))[0].tolist() == []
    assert wrong_rows(alone, torch.tensor([3, EXTRA]))[0].tolist() == [0, 1]
    assert wrong_rows(alone, torch.tensor([3, EXTRA]))[1].tolist() == []


def test_wrong_ones_are_drawn_by_similarity():
    logits = torch.tensor([[9.0, 0.3, -1.2, 2.0]], dtype=torch.float64)
    own, other = torch.tensor([1]), torch.tensor([1, 2, 3, EXTRA])
    wanted = torch.tensor([0.0, *logits[0, 1:].softmax(0).tolist()])
    drawn = torch.cat([draw_wrong(logits, own, other, seed=seed) for seed in range(4000)])
    found = torch.bincount(drawn, minlength=4) / 4000
    assert (found - wanted).abs().max() < 0.03
    assert torch.equal(draw_wrong(logits, own, other, seed=7), draw_wrong(logits.float(), own, other, seed=7))


def test_a_wrong_one_is_the_inverse_of_the_distribution():
    """Exactly, in float64, also where all the weight lies on the own group."""
    logits = torch.randn(50, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 40
    own, other = torch.arange(50) % 7, torch.arange(30) % 7
    shares = logits.masked_fill(own[:, None] == other[None, :], float("-inf")).softmax(1)
    uniform = torch.rand((50, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = [int((row.cumsum(0) <= u * row.sum()).sum()) for row, u in zip(shares, uniform, strict=True)]
    assert draw_wrong(logits, own, other, seed=3).tolist() == wanted


# ---------------------------------------------------------------- formulas in float64


def reference(model: Any, data: Batch, weights: dict[str, float], seed: int) -> torch.Tensor:
    """The published formulas, one row at a time, through the model's own heads."""
    heads, words = heads_of(model), Words.of(data.inputs)
    seen, texts = heads.see(data.inputs["pixel_values"]), heads.read(words.ids, words.mask)
    left, right = data.inputs[LEFT], data.inputs[RIGHT]
    n, m = len(left), len(right)
    cosines = seen.embeds @ texts.T
    scores = (cosines if cosines.dim() == 2 else cosines.max(1).values) * heads.scale().left
    mine = left[:, None] == right[None, :]
    there = [(scores[i].log_softmax(0))[mine[i]].mean() for i in range(n)]
    back = [(scores[:, j].log_softmax(0))[mine[:, j]].mean() for j in range(m) if right[j] != EXTRA]
    total = -weights.get("contrastive", 0) * (torch.stack(there).mean() + torch.stack(back).mean()) / 2
    pictures, columns = partners(left, right)
    if weights.get("matching"):
        wrong = fold(seed, "wrong")
        texts_of = draw_wrong(scores, left, right, seed=fold(wrong, "texts"))
        asked = (right != EXTRA).nonzero()[:, 0]
        pictures_of = draw_wrong(scores.T[asked], right[asked], left, seed=fold(wrong, "pictures"))
        pairs = [(int(i), int(j), 1) for i, j in zip(pictures, columns, strict=True)]
        pairs += [(i, int(j), 0) for i, j in enumerate(texts_of)]
        pairs += [(int(i), int(j), 0) for i, j in zip(pictures_of, asked, strict=True)]
        assert len(pairs) == matching_count(words)
        nats = [
            -heads.match(seen.tokens[i : i + 1], words.ids[j : j + 1], words.mask[j : j + 1]).log_softmax(1)[0, is_one]
            for i, j, is_one in pairs
        ]
        total = total + weights["matching"] * torch.stack(nats).mean()
    if weights.get("caption"):
        nats = []
        for i, j in zip(pictures, columns, strict=True):
            length = int(words.mask[j].sum())
            one = (words.ids[j : j + 1, :length], words.mask[j : j + 1, :length])
            logits = heads.write(seen.tokens[i : i + 1], *one)[0]
            nats += [-logits[t].log_softmax(0)[one[0][0, t + 1]] for t in range(length - 1)]
        assert len(nats) == caption_count(words)
        total = total + weights["caption"] * torch.stack(nats).mean()
    return total


@pytest.mark.parametrize("kind", list(MODELS))
def test_each_term_and_its_gradients_equal_the_formula(kind):
    model, data = load(kind), batch()
    for weights in (
        {"contrastive": 1.0},
        {"matching": 1.0},
        {"caption": 1.0},
        dict.fromkeys(heads_of(model).terms, 0.7),
    ):
        if not set(weights) <= set(heads_of(model).terms):
            continue
        objective = JointObjective(model, weights=weights, seed=4)
        assert isinstance(objective, StepObjective)
        model.zero_grad(set_to_none=True)
        loss = objective.loss(model, data)
        (loss.sum / loss.count).backward()
        found = gradients(model)
        model.zero_grad(set_to_none=True)
        wanted = reference(model, data, weights, fold(4, "alone", *data.ids))
        wanted.backward()
        assert loss.count == objective.count(data) == 4
        torch.testing.assert_close(loss.sum / 4, wanted.detach(), rtol=1e-10, atol=1e-10)
        expected = gradients(model)
        assert sum(bool(value.abs().max() > 1e-9) for value in expected.values()) > 10
        for name, value in expected.items():
            torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", ["blip", "blip2"])
def test_heads_equal_upstreams_forward(kind):
    model = load(kind, torch.float32)
    data, heads = batch([1, 2, 3], [1, 2, 3]), heads_of(model)
    pixels, words = data.inputs["pixel_values"].float(), Words.of(data.inputs)
    given = {"pixel_values": pixels, "input_ids": words.ids, "attention_mask": words.mask}
    seen, texts = heads.see(pixels), heads.read(words.ids, words.mask)
    if kind == "blip":
        matched, cosines = model(**given).itm_score, model(**given, use_itm_head=False).itm_score
        ours = seen.embeds @ texts.T
    else:
        matched = model(**given, use_image_text_matching_head=True).logits_per_image
        cosines = model(**given).logits_per_image
        ours = (seen.embeds @ texts.T).amax(1)
    torch.testing.assert_close(heads.match(seen.tokens, words.ids, words.mask), matched)
    torch.testing.assert_close(ours, cosines)
    assert float(heads.scale().left) == pytest.approx(SCALE)


def test_blips_decoder_equals_upstreams_captioner():
    from tests.objectives.joints import blip_config, spread

    torch.manual_seed(1)
    writer = spread(transformers.BlipForConditionalGeneration(blip_config())).eval()
    model = load("blip_joint", torch.float32)
    writer.vision_model.load_state_dict(model.vision_model.state_dict())
    data = batch([1, 2, 3], [1, 2, 3])
    pixels, words = data.inputs["pixel_values"].float(), Words.of(data.inputs)
    labels = words.ids.masked_fill(words.mask == 0, -100)
    ids = words.ids.clone()
    ids[:, 0] = writer.config.text_config.bos_token_id
    wanted = writer(pixel_values=pixels, input_ids=ids, attention_mask=words.mask, labels=labels).loss
    data.inputs["pixel_values"] = pixels
    loss = JointObjective(model, weights={"caption": 1.0}).loss(model, data)
    torch.testing.assert_close(loss.sum / loss.count, wanted)


def test_a_class_without_a_decoder_is_told_so():
    with pytest.raises(BackboneError, match="no head for: caption"):
        JointObjective(load("blip"), weights={"contrastive": 1.0, "caption": 1.0})
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 1})
    )
    with pytest.raises(BackboneError, match="no head that matches"):
        JointObjective(clip, weights={"contrastive": 1.0})


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("kind", ["joint", "blip2"])
def test_several_micro_batches_equal_one_batch(kind):
    """Contrastive over all rows and caption over all tokens; matching draws within its micro-batch."""
    model = load(kind)
    parts = [batch([1, 2], [1, 2, EXTRA], seed=1), batch([3, 4], [3, 4, 4], seed=2)]
    whole = Batch(_joined(parts), parts[0].labels, ("a",) * 4, 4, 0, 0)
    terms = [name for name in heads_of(model).terms if name != "matching"]
    objective = JointObjective(model, weights=dict.fromkeys(terms, 1.5))
    loss = objective.loss(model, whole)
    (loss.sum / 4).backward()
    wanted = gradients(model)
    model.zero_grad(set_to_none=True)
    sums = objective.backward(model, parts, step(4, 2))
    assert sums["loss"] == pytest.approx(loss.sum.item(), rel=1e-9)
    assert sums["correct"] == float(loss.logs["correct"])
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, wanted.get(name, torch.zeros_like(value)), rtol=1e-6, atol=1e-9)


def test_matching_of_a_step_is_the_mean_over_its_pairs():
    model = load("joint")
    parts = [batch(seed=1), batch([1, 2], [1, 2], seed=2)]
    objective = JointObjective(model, weights={"matching": 2.0})
    sums = objective.backward(model, parts, step(6, 2))
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    counts = [matching_count(Words.of(part.inputs)) for part in parts]
    total = sum(
        reference(model, part, {"matching": 2.0}, number) * count
        for number, (part, count) in enumerate(zip(parts, counts, strict=True))
    ) / sum(counts)
    total.backward()
    assert sums["loss"] / 6 == pytest.approx(total.item(), rel=1e-9)
    assert 0 <= sums["matched"] / 6 <= 1
    for name, value in gradients(model).items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, rtol=1e-6, atol=1e-9)


def _joined(parts: list[Batch]) -> dict[str, torch.Tensor]:
    width = max(part.inputs["input_ids"].shape[1] for part in parts)
    return {
        name: torch.cat(
            [
                F.pad(one, (0, width - one.shape[1])) if one.dim() == 2 else one
                for one in (p.inputs[name] for p in parts)
            ]
        )
        for name in parts[0].inputs
    }


# ---------------------------------------------------------------- the composed model


@pytest.mark.parametrize("kind", ["dual", "clip"])
def test_a_composed_model_is_saved_and_loaded(kind, tmp_path):
    folder = tiny_joint(kind)
    model, told = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, JointModel) and not told["missing_keys"] and not told["unexpected_keys"]
    again = transformers.AutoModel.from_pretrained(_saved(model, tmp_path))
    data = batch([1, 2], [1, 2])
    given = {name: value for name, value in data.inputs.items() if name not in (LEFT, RIGHT)}
    given["pixel_values"] = given["pixel_values"].float()
    one, other = model.eval()(**given), again.eval()(**given)
    for name in ("logits", "logits_per_image", "itm_logits"):
        assert torch.equal(one[name], other[name])
    assert model.decoder.get_output_embeddings().weight is model.decoder.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["dual", "clip"])
def test_parts_of_a_composed_model(kind):
    parts = find_parts(transformers.AutoModel.from_pretrained(tiny_joint(kind)))
    homes = {"dual.vision_model": "vision", "dual.text_model": "language", "decoder": "language", "itm_head": "head"}
    homes |= {"dual.visual_projection": "projector", "bridge_projection": "projector", "decoder.cls": "head"}
    homes |= {"decoder.bert.encoder.layer.0.crossattention": "cross_attention"}
    assert {name: parts.part_of(name) for name in homes} == homes


def test_the_decoder_starts_as_the_text_tower():
    model = load("joint")
    ours, theirs = model.decoder.base_model.embeddings, model.dual.text_model.embeddings
    assert torch.equal(ours.word_embeddings.weight, theirs.word_embeddings.weight)
    assert torch.equal(
        model.decoder.base_model.encoder.layer[0].attention.self.query.weight,
        model.dual.text_model.encoder.layer[0].attention.self.query.weight,
    )


@pytest.mark.parametrize("kind", ["joint", "blip_joint"])
def test_generation_equals_the_greedy_choice(kind):
    model = load(kind, torch.float32)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    made = model.generate(pixels, max_new_tokens=5, do_sample=False)
    heads = heads_of(model)
    tokens = heads.see(pixels).tokens
    ids = made[:, :1]
    for _ in range(made.shape[1] - 1):
        ids = torch.cat([ids, heads.write(tokens, ids, torch.ones_like(ids))[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids)


def _saved(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder)
    return folder
