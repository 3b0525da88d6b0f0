"""The head's loss with its gradient made in forward: the plain formula's numbers in every form of head."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmft.data.render import IGNORED
from mmft.fast import linear_loss
from mmft.fast.head import CANDIDATE, InForward, holds, linear_head
from mmft.fast.linear_loss import LinearHead, linear_cross_entropy
from mmft.fast.plan import NotHere
from mmft.recipe.schema import AdapterSection
from tests.fast.helpers import batches, distance, gradients, put_in, workplace


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_head(*, bias: bool, lora: bool, cap: float | None, scale: float) -> LinearHead:
    head = LinearHead(draw(7, 5, seed=1).requires_grad_(), scale=scale, cap=cap)
    if bias:
        head = replace(head, bias=draw(7, seed=2).requires_grad_())
    if lora:
        head = replace(head, a=nn.Parameter(draw(2, 5, seed=3)), b=nn.Parameter(draw(7, 2, seed=4)), scaling=0.5)
    return head


FORMS = list(itertools.product((False, True), (False, True), (None, 1.5), (1.0, 0.3), (0.0, 0.2)))


@pytest.mark.parametrize(("bias", "lora", "cap", "scale", "smoothing"), FORMS)
def test_every_form_of_head(monkeypatch, bias, lora, cap, scale, smoothing):
    monkeypatch.setattr(linear_loss, "LEAST_ROWS", 4)
    monkeypatch.setattr(linear_loss, "CHUNK_BYTES", 1)
    head = make_head(bias=bias, lora=lora, cap=cap, scale=scale)
    hidden, targets = draw(9, 5).requires_grad_(), torch.arange(9) % 7
    inputs = [one for one in (hidden, head.weight, head.bias, head.a, head.b) if one is not None]
    weight = head.weight if not lora else head.weight + head.scaling * head.b @ head.a
    logits = F.linear(hidden, weight, head.bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    plain = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    ours, hits, terms = linear_cross_entropy(hidden, targets, head, smoothing=smoothing)
    each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(terms, each, rtol=1e-12) and not terms.requires_grad
    assert torch.allclose(ours, plain, rtol=1e-12) and hits == (logits.argmax(-1) == targets).sum()
    for one, other in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * plain, inputs), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_gradients_by_differences():
    head = make_head(bias=True, lora=False, cap=2.0, scale=0.5)

    def run(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, torch.tensor([1, 0, 6]), replace(head, weight=weight, bias=bias), smoothing=0.1
        )[0]

    assert torch.autograd.gradcheck(run, (draw(3, 5).requires_grad_(), head.weight, head.bias))


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_softmax_is_taken_in_float32(scale):
    """Of products in bfloat16: the loss is that of these logits, to float32's own rounding."""
    head, hidden, targets = LinearHead(torch.randn(50, 8) * 2, scale=scale), torch.randn(20, 8), torch.arange(20)
    logits = F.linear(hidden.bfloat16(), head.weight.bfloat16()).float() * scale
    total, _, _ = linear_cross_entropy(hidden, targets, head, dtype=torch.bfloat16)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, F.cross_entropy(logits, targets, reduction="sum"), rtol=1e-6, atol=1e-6)


def test_no_rows_no_loss():
    head = make_head(bias=False, lora=False, cap=None, scale=1.0)
    hidden = draw(0, 5).requires_grad_()
    total, hits, _ = linear_cross_entropy(hidden, torch.zeros(0, dtype=torch.long), head)
    total.backward()
    assert total == 0 and hits == 0 and hidden.grad is not None


def test_only_chunks_of_logits_exist():
    """No tensor of all rows and the whole vocabulary is kept for backward."""
    head = LinearHead(torch.randn(5000, 8))
    hidden = torch.randn(64, 8, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        linear_cross_entropy(hidden, torch.zeros(64, dtype=torch.long), head)
    assert max(sizes) == hidden.numel()


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_vl"])
def test_a_run_has_the_same_loss_and_gradients(tmp_path, kind):
    engine, setting, work = workplace(tmp_path, kind=kind)
    (batch,) = batches(engine)
    plain, before = gradients(work, batch), work.objective.loss(work.adapted.model, batch)
    work = put_in(setting, work, CANDIDATE)
    assert isinstance(work.objective, InForward) and work.objective.count(batch) == batch.supervised
    fast, after = gradients(work, batch), work.objective.loss(work.adapted.model, batch)
    assert abs(fast[0] - plain[0]) <= 1e-5 * plain[0] and distance(fast[1], plain[1]) <= 1e-5
    assert after.logs["correct"] == before.logs["correct"] and after.count == before.count


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_trained_head(tmp_path, mode):
    section = AdapterSection(targets=("language.attention", "head"), lora_rank=4, parts={"head": {"mode": mode}})
    engine, setting, work = workplace(tmp_path, adapter=section)
    (batch,) = batches(engine)
    plain = gradients(work, batch)
    fast = gradients(put_in(setting, work, CANDIDATE), batch)
    assert any("lm_head" in name for name in fast[1])
    assert abs(fast[0] - plain[0]) <= 1e-5 * plain[0] and distance(fast[1], plain[1]) <= 1e-5


def test_a_batch_without_supervised_rows(tmp_path):
    engine, setting, work = workplace(tmp_path)
    batch = batches(engine)[0]
    batch = replace(batch, labels=torch.full_like(batch.labels, IGNORED), supervised=0)
    work = put_in(setting, work, CANDIDATE)
    loss = work.objective.loss(work.adapted.model, batch)
    loss.sum.backward()
    assert loss.sum == 0


def test_bf16_is_no_further_from_the_truth(tmp_path):
    engine, setting, work = workplace(tmp_path, bf16=True)
    (batch,) = batches(engine)
    truth, plain = gradients(work, batch), gradients(work, batch, bf16=True)
    fast = gradients(put_in(setting, work, CANDIDATE), batch, bf16=True)
    assert distance(fast[1], truth[1]) <= 1.05 * distance(plain[1], truth[1])


@pytest.mark.parametrize("change", [lambda x: 20 * torch.tanh(x / 20), lambda x: x * 0.5])
def test_a_model_that_does_more_to_its_logits_is_refused(tmp_path, change):
    """Soft caps show on large logits only: the proof makes them large."""
    _, setting, work = workplace(tmp_path)
    head = work.objective.head
    handle = head.register_forward_hook(lambda _, args, out: change(out))
    with pytest.raises(NotHere, match="not those of its head"):
        CANDIDATE.install(setting, work)
    handle.remove()
    CANDIDATE.install(setting, work)


def test_what_the_config_states_is_honoured(tmp_path):
    _, setting, work = workplace(tmp_path)
    handle = work.objective.head.register_forward_hook(lambda _, args, out: 20 * torch.tanh(out / 20))
    setting.adapted.backbone.model.config.get_text_config().final_logit_softcapping = 20.0
    assert CANDIDATE.install(setting, work).objective.head.cap == 20.0
    handle.remove()
    with pytest.raises(NotHere):
        CANDIDATE.install(setting, work)


def test_scales_that_the_config_states():
    """A factor or a divisor of the logits, and not more than it."""
    module = nn.Linear(4, 9, bias=False)
    scales = [
        linear_head(module, SimpleNamespace(**config)).scale
        for config in ({}, {"logit_scale": 0.25}, {"logits_scaling": 8.0}, {"logit_scale": 3.0, "logits_scaling": 2.0})
    ]
    assert scales == [1.0, 0.25, 0.125, 1.5]


def test_smoothing_of_the_recipe(tmp_path):
    engine, setting, work = workplace(tmp_path)
    (batch,) = batches(engine)
    work.objective.label_smoothing = 0.2
    plain = gradients(work, batch)
    fast = gradients(put_in(setting, work, CANDIDATE), batch)
    assert abs(fast[0] - plain[0]) <= 1e-5 * plain[0] and distance(fast[1], plain[1]) <= 1e-5


def test_other_losses_keep_their_head(tmp_path):
    _, setting, _ = workplace(tmp_path)
    assert holds(setting)[0] and not holds(replace(setting, custom=True))[0]
