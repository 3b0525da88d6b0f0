"""Masked language modelling with pictures: what is hidden, the model's own loss, and the scores."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from mmft.backbones.load import load_backbone
from mmft.data.formats import load_many
from mmft.data.masked import MaskedRenderer, hide
from mmft.data.pairs import merge_pairs
from mmft.data.render import IGNORED
from mmft.errors import BackboneError, DataError
from mmft.evaluation.masked import masked_rows, score_masked
from mmft.objectives.mlm import MaskedObjective, masked_logits
from mmft.recipe.schema import DataSection, ModelSection
from tests.objectives.joints import MASKED, tiny_blip, tiny_masked
from tests.objectives.pairs import pair_rows


def loaded(kind: str) -> Any:
    return load_backbone(ModelSection(name_or_path=str(tiny_masked(kind)), dtype="float32"))


def samples(n: int = 8) -> list[Any]:
    data = DataSection.model_validate({"train": [{"path": str(pair_rows(n))}]})
    return merge_pairs([one for part in load_many(data.train, data, 0) for one in part.samples])


# ---------------------------------------------------------------- what is hidden


def test_hiding_follows_bert():
    ids, usable, words = list(range(100, 160)), list(range(1, 59)), list(range(300))
    counts: Counter[str] = Counter()
    for number in range(400):
        hidden, labels = hide(ids, usable, mask_token=999, words=words, keys=(0, 0, str(number)))
        chosen = [place for place, label in enumerate(labels) if label != IGNORED]
        assert len(chosen) == round(58 * 0.15) and set(chosen) <= set(usable)
        assert all(labels[place] == ids[place] for place in chosen)
        assert all(hidden[place] == ids[place] for place in range(60) if place not in chosen)
        counts.update("mask" if hidden[p] == 999 else "kept" if hidden[p] == ids[p] else "random" for p in chosen)
    total = counts.total()
    assert counts["mask"] / total == pytest.approx(0.8, abs=0.02)
    assert counts["random"] / total == pytest.approx(0.1, abs=0.02)
    assert hide([7, 8, 9], [1], mask_token=0, words=words, keys=(0, 0, "a"))[1] == [IGNORED, 8, IGNORED]
    assert hide([7, 9], [], mask_token=0, words=words, keys=(0, 0, "a")) == ([7, 9], [IGNORED, IGNORED])


def test_hiding_is_a_pure_function_of_seed_epoch_and_id():
    renderer = MaskedRenderer(loaded("vilt").processor, max_length=24, seed=3)
    rows = samples()
    one = renderer.assemble([(sample, 1) for sample in rows])
    alone = [renderer.assemble([(sample, 1)]) for sample in rows]
    for place, other in enumerate(alone):
        length = int(other.inputs["attention_mask"].sum())
        assert torch.equal(one.labels[place, :length], other.labels[0, :length])
        assert torch.equal(one.inputs["input_ids"][place, :length], other.inputs["input_ids"][0, :length])
    later = renderer.assemble([(sample, 2) for sample in rows])
    assert one.labels.shape != later.labels.shape or not torch.equal(one.labels, later.labels)
    assert torch.equal(one.inputs["pixel_values"], later.inputs["pixel_values"])  # pictures are whole
    special = set(renderer.tokenizer.all_special_ids)
    assert not special & set(one.labels[one.labels != IGNORED].tolist())
    assert one.supervised == int((one.labels != IGNORED).sum()) >= len(rows)


def test_a_tokenizer_without_a_mask_is_refused():
    processor = load_backbone(ModelSection(name_or_path=str(tiny_blip()), dtype="float32")).processor
    with pytest.raises(DataError, match="no mask token"):
        MaskedRenderer(processor, max_length=24)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", list(MASKED))
def test_the_loss_is_the_models_own(kind):
    """Value and gradients; FLAVA's own is `loss_info.mmm_text`."""
    backbone = loaded(kind)
    model = backbone.model.double().eval().requires_grad_()
    renderer = MaskedRenderer(backbone.processor, max_length=24, seed=3)
    batch = renderer.assemble([(sample, 0) for sample in samples()])
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in batch.inputs.items()}
    batch.inputs.update(inputs)
    objective = MaskedObjective(model)
    torch.manual_seed(5)  # ViLT shuffles the patches of pictures of several sizes
    loss = objective.loss(model, batch)
    (loss.sum / loss.count).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    if kind == "flava":
        own = model(
            input_ids=inputs["input_ids"],
            input_ids_masked=inputs["input_ids"],
            pixel_values=inputs["pixel_values"],
            attention_mask=inputs["attention_mask"],
            mlm_labels=batch.labels,
            itm_labels=torch.ones(len(batch.ids), dtype=torch.long),
            bool_masked_pos=torch.zeros(len(batch.ids), 16, dtype=torch.long),  # all patches are seen
            mim_labels=torch.zeros(len(batch.ids), 16, dtype=torch.long),
            return_loss=True,
        ).loss_info.mmm_text
    else:
        own = model(**inputs, labels=batch.labels).loss
    own.backward()
    torch.testing.assert_close(loss.sum / loss.count, own.detach(), rtol=1e-10, atol=1e-10)
    for name, value in model.named_parameters():
        if value.grad is not None and value.grad.abs().max() > 0:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-7, atol=1e-11)


def test_models_that_see_no_pictures_are_refused():
    regions = transformers.VisualBertForPreTraining(
        transformers.VisualBertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )
    with pytest.raises(BackboneError, match="detector's regions"):
        MaskedObjective(regions)
    blip = load_backbone(ModelSection(name_or_path=str(tiny_blip()), dtype="float32")).model
    with pytest.raises(BackboneError, match="no masked language modelling head"):
        MaskedObjective(blip)


# ---------------------------------------------------------------- the scores


def test_scores_are_ratios_over_hidden_tokens():
    backbone = loaded("vilt")
    renderer = MaskedRenderer(backbone.processor, max_length=24, seed=3)
    rows = samples(8)
    found = masked_rows(backbone.model, renderer, rows, batch_size=3)
    batch = renderer.assemble([(sample, 0) for sample in rows])
    torch.manual_seed(0)
    logits = masked_logits(backbone.model.eval(), batch.inputs, kind="ViltForMaskedLM").detach()
    hidden = batch.labels != IGNORED
    nats = -logits.log_softmax(-1)[hidden].gather(1, batch.labels[hidden][:, None])
    assert found[:, 2].sum() == int(hidden.sum())
    assert found[:, 1].sum() == pytest.approx(float(nats.sum()), rel=1e-4)
    other = np.array(found)
    other[:, 0] = other[:, 2]
    scored = score_masked({"base": {"set": found}, "adapter": {"set": other}}, bootstrap_samples=100, seed=0)
    scores = scored["scores"]
    assert scores["base"]["perplexity"]["value"] == pytest.approx(math.exp(found[:, 1].sum() / found[:, 2].sum()))
    assert scores["adapter"]["masked_accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 8}
    assert scores["base"]["perplexity"]["low"] <= scores["base"]["perplexity"]["value"]
    assert scored["sets"]["set"]["paired"]["adapter-base"]["difference"] >= 0
    json.dumps(scored)
