"""Dual learning against its formulas in float64, a term and a row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmft.data.collate import Batch
from mmft.data.pairs import EXTRA, LEFT, RIGHT
from mmft.errors import BackboneError
from mmft.objectives.base import StepObjective
from mmft.objectives.dual import DualObjective, sampled_captions
from mmft.objectives.joint import Words, partners
from mmft.objectives.joint_heads import heads_of
from mmft.seeds import fold
from tests.objectives.test_joint import batch, gradients, load, reference, step


def likelihood(heads: Any, tokens: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """log p(text | picture) of one row without its padding."""
    length = int(mask.sum())
    logits = heads.write(tokens[None], ids[None, :length], mask[None, :length])[0]
    return torch.stack([logits[t].log_softmax(0)[ids[t + 1]] for t in range(length - 1)]).sum()


def consistency(model: Any, data: Batch, form: str, seed: int) -> torch.Tensor:
    """The consistency term as its docstring says it."""
    heads, words = heads_of(model), Words.of(data.inputs)
    seen, texts = heads.see(data.inputs["pixel_values"]), heads.read(words.ids, words.mask)
    left, right, n = data.inputs[LEFT], data.inputs[RIGHT], len(data.inputs[LEFT])
    scale = heads.scale().right
    asked = [j for j in range(len(right)) if right[j] != EXTRA]
    terms = []
    for j in asked:
        written = torch.stack([likelihood(heads, seen.tokens[i], words.ids[j], words.mask[j]) for i in range(n)])
        found = (scale * (seen.embeds @ texts[j])).log_softmax(0)
        own = left == right[j]
        if form == "duality":
            marginal = written.logsumexp(0) - torch.tensor(float(n)).log()  # log p(y), pictures being equally likely
            by_captioner = (written - torch.tensor(float(n)).log() - marginal)[own].logsumexp(0)
            terms.append((by_captioner - found[own].logsumexp(0)) ** 2)
        else:
            terms.append(-(found.exp() * written).sum() / (int(words.mask[j].sum()) - 1))
    total = torch.stack(terms).mean()
    if form == "duality":
        return total
    ids, mask = sampled_captions(heads, seen.tokens, words, seed=fold(seed, "speak"))
    spoken = heads.read(ids, mask)
    rewards, nats = [], []
    for i in range(n):
        found = (scale * (seen.embeds @ spoken[i])).log_softmax(0)
        rewards.append(found[left == left[i]].logsumexp(0))
        nats.append(likelihood(heads, seen.tokens[i], ids[i], mask[i]))
    there = []
    for i in range(n):
        baseline = torch.stack([rewards[k] for k in range(n) if k != i]).mean()
        there.append(-rewards[i] - float((rewards[i] - baseline).detach()) * nats[i])
    return total + torch.stack(there).mean()


@pytest.mark.parametrize("kind", ["joint", "blip_joint"])
@pytest.mark.parametrize("form", ["duality", "cycle"])
def test_loss_and_gradients_equal_the_formula(kind, form):
    model, data = load(kind), batch()
    objective = DualObjective(
        model, weights={"contrastive": 0.5, "caption": 1.0, "consistency": 0.3}, form=form, seed=4
    )
    assert isinstance(objective, StepObjective)
    loss = objective.loss(model, data)
    (loss.sum / loss.count).backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    seed = fold(4, "alone", *data.ids)
    extra = consistency(model, data, form, seed)
    wanted = reference(model, data, {"contrastive": 0.5, "caption": 1.0}, seed) + 0.3 * extra
    wanted.backward()
    torch.testing.assert_close(loss.sum / 4, wanted.detach(), rtol=1e-9, atol=1e-9)
    assert {name for name, _ in objective.metrics.values()} == set(loss.logs)
    for name, value in gradients(model).items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(value)), value, rtol=1e-6, atol=1e-9)
    logged = sum(float(loss.logs[name]) for name in ("duality", "there", "back") if name in loss.logs) / 4
    assert logged == pytest.approx(extra.item(), rel=1e-9)


def test_the_table_is_the_same_in_slices(monkeypatch):
    model, data = load("joint"), batch()
    objective = DualObjective(model, weights={"contrastive": 1.0, "caption": 1.0, "consistency": 1.0})
    whole = objective.loss(model, data)
    monkeypatch.setattr("mmft.objectives.dual._ROWS_AT_ONCE", 4)
    torch.testing.assert_close(objective.loss(model, data).sum, whole.sum, rtol=1e-12, atol=1e-12)


def test_without_consistency_it_is_the_two_directions():
    model, data = load("joint"), batch()
    objective = DualObjective(model, weights={"contrastive": 1.0, "caption": 1.0, "consistency": 0.0})
    loss = objective.loss(model, data)
    wanted = reference(model, data, {"contrastive": 1.0, "caption": 1.0}, 0)
    torch.testing.assert_close(loss.sum / 4, wanted, rtol=1e-10, atol=1e-10)
    assert set(objective.metrics) == {"batch_accuracy", "contrastive", "caption"}


def test_a_captioner_that_agrees_with_the_finder_has_no_gap():
    from mmft.objectives.dual import back_terms, duality_terms, there_terms

    table = torch.randn(3, 4, dtype=torch.float64)
    own = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert duality_terms(table, (table + 5).log_softmax(1), own).abs().max() < 1e-20
    sure = torch.full((3, 4), float("-1e9"), dtype=torch.float64)
    sure[0, 0] = sure[1, 1] = sure[2, 2] = 0.0
    torch.testing.assert_close(
        back_terms(table, sure, torch.tensor([2, 3, 4])), -table.diagonal() / torch.tensor([2, 3, 4])
    )
    reward, nats = torch.tensor([-1.0, -3.0]), torch.tensor([-10.0, -20.0])
    torch.testing.assert_close(there_terms(reward, nats), torch.tensor([1.0 - (2.0) * -10, 3.0 - (-2.0) * -20]))


def test_sampled_captions_follow_the_captioner_and_end_once():
    model, data = load("joint"), batch([1] * 40, [1] * 3)
    heads, words = heads_of(model), Words.of(data.inputs)
    tokens = heads.see(data.inputs["pixel_values"]).tokens
    one = tokens[:1].expand(40, -1, -1)
    with torch.no_grad():
        model.decoder.cls.predictions.bias[:] = -20.0
        model.decoder.cls.predictions.bias[[2, 100, 101]] = torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64)
        model.decoder.cls.predictions.decoder.weight[[2, 100, 101]] = 0.0
    counts = torch.zeros(320)
    for seed in range(30):
        ids, mask = sampled_captions(heads, one, words, seed=seed)
        counts += torch.bincount(ids[:, 1], minlength=320)
        for row, real in zip(ids, mask.bool(), strict=True):
            assert row[0] == words.ids[0, 0]
            spoken = row[real].tolist()
            assert 2 not in spoken[:-1] and (spoken[-1] == 2 or len(spoken) == len(row))
            assert real.tolist() == sorted(real.tolist(), reverse=True)
    shares = counts / counts.sum()
    wanted = torch.tensor([3.0, 3.0, 1.0]).softmax(0)
    assert (shares[[2, 100, 101]] - wanted).abs().max() < 0.04
    again = sampled_captions(heads, one, words, seed=29)
    assert torch.equal(again[0], ids)


def test_several_micro_batches_tie_within_each():
    model = load("joint")
    parts = [batch(seed=1), batch([1, 2], [1, 2], seed=2)]
    objective = DualObjective(model, weights={"contrastive": 0.0, "caption": 0.0, "consistency": 1.0})
    sums = objective.backward(model, parts, step(6, 2))
    texts = [len(partners(part.inputs[LEFT], part.inputs[RIGHT])[1]) for part in parts]
    wanted = sum(consistency(model, part, "duality", 0) * n for part, n in zip(parts, texts, strict=True)) / sum(texts)
    assert sums["loss"] / 6 == pytest.approx(wanted.item(), rel=1e-9)


def test_each_tower_serves_its_direction():
    """An adapter in the text tower learns from finding alone, one in the decoder from writing alone, one in the
    picture tower from both."""
    model, data = load("joint"), batch()
    reached = {}
    for term in ("contrastive", "caption"):
        model.zero_grad(set_to_none=True)
        objective = DualObjective(model, weights={"contrastive": 0.0, "caption": 0.0, "consistency": 0.0, term: 1.0})
        objective.loss(model, data).sum.backward()
        found = {name for name, value in gradients(model).items() if value.abs().max() > 0}
        reached[term] = {
            part
            for part in ("dual.text_model", "dual.vision_model", "decoder")
            if any(n.startswith(part) for n in found)
        }
    assert reached == {
        "contrastive": {"dual.text_model", "dual.vision_model"},
        "caption": {"decoder", "dual.vision_model"},
    }


def test_a_model_that_does_not_write_is_refused():
    with pytest.raises(BackboneError, match="no head for: caption"):
        DualObjective(load("blip"), weights={"contrastive": 1.0, "caption": 1.0})
