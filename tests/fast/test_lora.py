"""LoRA's own autograd against peft's: fp64 gradients by differences, fp32 to 1e-6, bf16 no further from the truth."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmft.fast import lora_fused
from mmft.fast.lora_fused import CANDIDATE, ONCE, chosen, holds, once_holds
from mmft.fast.lora_gated import ACTS, run_gated
from mmft.fast.lora_layers import lora_layers_of, shared_inputs, why_not
from mmft.fast.lora_linear import Line, Stack, run_lines
from mmft.recipe.schema import AdapterSection
from tests.fast.helpers import WIDE, batches, distance, gradients, names_and_values, put_in, workplace


def line(wide: int, narrow: int, rank: int, seed: int, *, bias: bool = False) -> Line:
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    weight, a, b = draw(wide, narrow), nn.Parameter(draw(rank, narrow)), nn.Parameter(draw(wide, rank))
    return Line(weight.to, draw(wide) if bias else None, a, b, 0.7)


def test_gradients_by_differences():
    stack = Stack([line(6, 5, 2, 1, bias=True), line(4, 5, 3, 2)])
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        stack.forget()  # gradcheck writes through .data
        return torch.cat(run_lines(x, stack, dtype=torch.float64, training=True), -1)  # gradients of both at once

    assert torch.autograd.gradcheck(run, (x, *stack.params))


@pytest.mark.parametrize("act", ACTS)
def test_gradients_of_a_gated_block_by_differences(act):
    first, second = Stack([line(6, 5, 2, 1), line(6, 5, 3, 2)]), Stack([line(5, 6, 2, 3, bias=True)])
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(x, *_):
        first.forget(), second.forget()
        return run_gated(x, first, second, act, dtype=torch.float64, training=True)

    assert torch.autograd.gradcheck(run, (x, *first.params, *second.params))


def test_all_is_computed_in_the_type_of_the_forward():
    """States in float32 under bf16 autocast: products, what is kept, and gradients to the states' own type."""
    weight = torch.randn(6, 5)
    stack = Stack([Line(weight.to, None, nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2)), 0.7)])
    x, kinds = torch.randn(3, 5, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kinds.append(one.dtype) or one, lambda one: one):
        (out,) = run_lines(x, stack, dtype=torch.bfloat16, training=True)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and set(kinds) == {torch.bfloat16}
    assert {one.grad.dtype for one in (x, *stack.params)} == {torch.float32}


def test_no_rows_are_no_error():
    x = torch.zeros(1, 0, 5, dtype=torch.float64, requires_grad=True)
    (out,) = run_lines(x, Stack([line(6, 5, 2, 1)]), dtype=x.dtype, training=True)
    out.sum().backward()
    assert out.shape == (1, 0, 6)


def test_a_branch_without_a_gradient_is_left_out():
    stack = Stack([line(6, 5, 2, 1), line(4, 5, 3, 2)])
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    whole = torch.autograd.grad(run_lines(x, stack, dtype=x.dtype, training=True)[1].sum(), (x, stack.lines[1].a))
    alone = Stack([stack.lines[1]])
    assert all(
        torch.allclose(one, other)
        for one, other in zip(
            whole,
            torch.autograd.grad(run_lines(x, alone, dtype=x.dtype, training=True)[0].sum(), (x, alone.lines[0].a)),
            strict=True,
        )
    )


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_vl"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fp32_is_peft(tmp_path, kind, dropout):
    """Dropout draws the masks that peft draws."""
    section = WIDE.model_copy(update={"lora_dropout": dropout, "use_rslora": dropout == 0})
    engine, setting, work = workplace(tmp_path, kind=kind, adapter=section)
    (batch,) = batches(engine)
    plain = gradients(work, batch)
    work = put_in(setting, work, CANDIDATE)
    model = work.adapted.model
    shared = [layer.mmft_site.sites for layer in lora_layers_of(model).values() if len(layer.mmft_site.sites) > 1]
    assert len(shared) == 4  # q, k, v and gate, up of two layers
    assert sum(hasattr(module, "mmft_gated") for module in model.modules()) == 2
    fast = gradients(work, batch)
    assert abs(fast[0] - plain[0]) <= 1e-6 * abs(plain[0])
    assert distance(fast[1], plain[1]) <= 2e-6
    work.release()
    again = gradients(work, batch)
    assert again[0] == plain[0] and distance(again[1], plain[1]) == 0.0
    assert not any(hasattr(module, "mmft_site") or hasattr(module, "mmft_gated") for module in model.modules())


def test_bf16_is_no_further_from_the_truth(tmp_path):
    engine, setting, work = workplace(tmp_path, bf16=True)
    (batch,) = batches(engine)
    truth = gradients(work, batch)
    plain = gradients(work, batch, bf16=True)
    fast = gradients(put_in(setting, work, CANDIDATE), batch, bf16=True)
    assert distance(fast[1], truth[1]) <= 1.05 * distance(plain[1], truth[1])
    assert abs(fast[0] - truth[0]) <= max(1.5 * abs(plain[0] - truth[0]), 2e-3 * truth[0])


def test_four_bits(tmp_path):
    """Kept or dequantised again: the same numbers, those of peft, also after an evaluation in between."""
    engine, setting, work = workplace(tmp_path, four_bit=True)
    (batch,) = batches(engine)
    plain = gradients(work, batch)
    assert once_holds(setting)[0] and "free" in once_holds(setting)[1]
    work = put_in(setting, work, CANDIDATE)
    fast = gradients(work, batch)
    work = put_in(setting, work, ONCE)
    assert all(layer.mmft_site.line.keeps for layer in lora_layers_of(work.adapted.model).values())
    work.adapted.model.eval()
    with torch.no_grad():
        work.objective.loss(work.adapted.model, batch)
    engine._training_mode()
    kept = gradients(work, batch)
    assert distance(fast[1], plain[1]) <= 2e-6
    assert kept[0] == fast[0] and distance(kept[1], fast[1]) == 0.0


def test_kept_weights_are_dequantised_once(tmp_path, monkeypatch):
    engine, setting, work = workplace(tmp_path, four_bit=True)
    (batch,) = batches(engine)
    calls = []
    from mmft.fast import lora_layers

    real = lora_layers.dequantized_weight
    monkeypatch.setattr(lora_layers, "dequantized_weight", lambda *args: calls.append(1) or real(*args))
    work = put_in(setting, work, CANDIDATE)
    gradients(work, batch)
    twice, layers = len(calls), len(lora_layers_of(work.adapted.model))
    work = put_in(setting, work, ONCE)
    calls.clear()
    gradients(work, batch)
    assert len(calls) == layers and twice > layers


def test_kept_weights_need_room(tmp_path, monkeypatch):
    """16-bit weights stay between forward and backward where they take at most half of what is free."""
    _, setting, _ = workplace(tmp_path, four_bit=True)
    bases = [layer.get_base_layer() for layer in lora_layers_of(setting.adapted.model).values()]
    wide = sum(2 * base.in_features * base.out_features for base in bases)
    for free, on in ((2 * wide, True), (2 * wide - 1, False)):
        monkeypatch.setattr(lora_fused, "free_memory", lambda _, free=free: free)
        assert once_holds(setting)[0] == on


def test_a_waiting_output_is_of_its_own_input(tmp_path):
    """Layers that shared an input once may be given another one, or the same one after something was written to it."""
    _, setting, work = workplace(tmp_path)
    model = put_in(setting, work, CANDIDATE).adapted.model
    layer = next(module for name, module in model.named_modules() if name.endswith("language_model.layers.0.self_attn"))
    x = torch.randn(1, 3, layer.q_proj.in_features)
    other = torch.randn_like(x)
    plain = layer.k_proj(other).clone()
    layer.q_proj(x)
    assert torch.equal(layer.k_proj(other), plain)
    layer.q_proj(x)
    x.copy_(other)
    assert torch.allclose(layer.v_proj(x), layer.v_proj(other), atol=1e-6)


def test_a_block_that_does_more_is_left_alone(tmp_path):
    """Seen in numbers: no name tells it."""
    _, setting, work = workplace(tmp_path)
    model = work.adapted.model
    blocks = [module for module in model.modules() if hasattr(module, "act_fn") and hasattr(module, "gate_proj")]
    kind = type(blocks[0])
    more = {"forward": lambda self, x: 1.1 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))}
    blocks[0].__class__ = type("More", (kind,), more)
    put_in(setting, work, CANDIDATE)
    assert [hasattr(block, "mmft_gated") for block in blocks] == [False, True]


def test_masters_are_rounded_once_a_step_and_an_update_is_seen(tmp_path):
    engine, setting, work = workplace(tmp_path, bf16=True)
    work = put_in(setting, work, CANDIDATE)
    site = next(iter(lora_layers_of(work.adapted.model).values())).mmft_site
    first = site.stack.a(torch.bfloat16)
    assert site.stack.a(torch.bfloat16) is first
    optimizer = torch.optim.AdamW([site.line.a], lr=0.1, fused=True)
    site.line.a.grad = torch.ones_like(site.line.a)
    optimizer.step()
    assert site.stack.a(torch.bfloat16) is not first
    assert torch.equal(site.stack.a(torch.bfloat16)[: len(site.line.a)], site.line.a.bfloat16())
    layer = next(iter(lora_layers_of(work.adapted.model).values()))
    layer.lora_A["default"].load_state_dict({"weight": torch.zeros_like(site.line.a)})
    assert not site.stack.a(torch.bfloat16)[: len(site.line.a)].any()


def test_peft_still_rules_its_layers(tmp_path):
    """Names, state, adapters off, merge and a copy are those of the plain model."""
    engine, setting, work = workplace(tmp_path)
    model = work.adapted.model.eval()
    inputs = batches(engine)[0].inputs
    before, kinds = names_and_values(model), [type(module).__name__ for module in model.modules()]
    with torch.no_grad():
        plain = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    work = put_in(setting, work, CANDIDATE)
    assert [type(module).__name__ for module in model.modules()] == kinds
    assert names_and_values(model).keys() == before.keys()
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base)
    assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)
    twin = copy.deepcopy(model)
    assert torch.allclose(twin(**inputs).logits, plain, atol=1e-5)
    model.merge_adapter()
    assert torch.allclose(model(**inputs).logits, plain, atol=1e-4)
    model.unmerge_adapter()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    assert torch.allclose(model(**inputs).logits, base, atol=1e-5)  # B of a new adapter is zero


def test_checkpointing_keeps_nothing_more(tmp_path):
    engine, setting, work = workplace(tmp_path, gradient_checkpointing=True)
    (batch,) = batches(engine)
    plain = gradients(work, batch)
    fast = gradients(put_in(setting, work, CANDIDATE), batch)
    assert distance(fast[1], plain[1]) <= 2e-6


def test_less_is_kept_for_backward(tmp_path):
    engine, setting, work = workplace(tmp_path, bf16=True)
    (batch,) = batches(engine)

    def kept(work) -> int:
        sizes = {}

        def pack(value):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        weights = {value.untyped_storage().data_ptr() for value in work.adapted.model.parameters()}
        keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
        with keeping, torch.autocast("cpu", dtype=torch.bfloat16):
            alive = work.objective.loss(work.adapted.model, batch)
        del alive
        return sum(size for place, size in sizes.items() if place not in weights)

    plain = kept(work)
    assert kept(put_in(setting, work, CANDIDATE)) < 0.7 * plain


def test_what_stays_with_peft(tmp_path):
    _, setting, work = workplace(tmp_path, adapter=AdapterSection(targets=("language.attention",), use_dora=True))
    on, reason = holds(setting)
    assert not on and "variant" in reason and not chosen(work.adapted.model)
    layer = next(iter(lora_layers_of(work.adapted.model).values()))
    assert why_not(layer) is not None


def test_who_shares_an_input():
    x, y = torch.zeros(1), torch.zeros(1)
    calls = [("a.q", x, 0), ("a.k", x, 0), ("a.v", y, 0), ("b.q", y, 0), ("b.k", y, 1), ("c.q", x, 0), ("c.q", x, 0)]
    assert shared_inputs(calls) == [["a.q", "a.k"]]
