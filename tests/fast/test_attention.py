"""Attention by matrix products and RMS norms: torch's own numbers, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmft.fast import attention, fused_norms, products
from mmft.fast.attention import grouped_attention
from mmft.fast.norms import eps_of, is_rms_norm, rms_norm
from mmft.fast.plan import NotHere
from tests.fast.helpers import batches, distance, gradients, put_in, workplace


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("kept", [512, 0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [None, "bool", "added"])
@pytest.mark.parametrize("length", [5, 300])
def test_sdpa_by_products(monkeypatch, length, masked, causal, kept):
    """With grouped queries, values of another width, blocks of queries, P kept or made again."""
    torch.manual_seed(0)
    monkeypatch.setattr(attention, "KEPT_KEYS", kept)
    query, key, value = draw(2, 6, length, 8), draw(2, 2, length, 8), draw(2, 2, length, 4)
    seen = torch.eye(length, dtype=torch.bool) | (torch.rand(2, 1, length, length) > 0.3)
    whole = seen & torch.ones(length, length, dtype=torch.bool).tril() if causal else seen
    mask = {"bool": seen, "added": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e30), None: None}
    ours = grouped_attention(query, key, value, mask=mask[masked], causal=causal, scale=0.3)
    given = {"attn_mask": whole} if masked else {"is_causal": causal}
    theirs = F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True, **given)
    slope = torch.randn_like(ours)
    assert torch.allclose(ours, theirs, atol=1e-12)
    pairs = (torch.autograd.grad(one, (query, key, value), slope) for one in (ours, theirs))
    assert all(torch.allclose(one, other, atol=1e-11) for one, other in zip(*pairs, strict=True))


def test_a_plain_matrix_is_a_mask_of_all_rows():
    query, key, value, seen = draw(2, 4, 6, 8), draw(2, 2, 6, 8), draw(2, 2, 6, 8), torch.rand(6, 6) > 0.3
    seen |= torch.eye(6, dtype=torch.bool)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    assert torch.allclose(grouped_attention(query, key, value, mask=seen), theirs)


def test_a_query_that_sees_nothing_gives_no_nan():
    query, key, value = draw(1, 2, 4, 8), draw(1, 2, 4, 8), draw(1, 2, 4, 8)
    out = grouped_attention(query, key, value, mask=torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    assert all(torch.isfinite(one).all() for one in (out, *torch.autograd.grad(out.sum(), (query, key, value))))


def test_bf16_is_close():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 200, 32).bfloat16() for _ in range(3))
    truth = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    ours = grouped_attention(query, key, value, causal=True)
    assert (ours - truth).norm() <= 1.6 * (theirs - truth).norm()  # P is rounded once more


CALLS = (
    {"scaling": 0.7},
    {"dropout": 0.5},
    {"bias": True},
    {"is_causal": False},
    {"masked": True},
    {"queries": 1},
    {"queries": 2},
    {"length": 600, "is_causal": False},
)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_call_is_that_of_sdpa(call, monkeypatch):
    """What transformers asks for in a call is what it gets; what products are not meant for goes to `sdpa`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS,
        "sdpa",
        lambda *given, **options: asked.append(options) or sdpa_attention_forward(*given, **options),
    )
    given = dict(call)
    length, queries = given.pop("length", 9), given.pop("queries", None)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 3
    query, key, value = draw(2, 6, queries or length, 8), draw(2, 2, length, 8), draw(2, 2, length, 8)
    if given.pop("bias", False):
        given["position_bias"] = torch.randn(1, 6, length, length, dtype=torch.float64)
    mask = None
    if given.pop("masked", False):
        mask = (torch.rand(2, 1, length, length) > 0.4) | torch.eye(length, dtype=torch.bool)
    outs = []
    for run in (sdpa_attention_forward, products.attention_forward):
        torch.manual_seed(0)
        outs.append(run(module, query, key, value, mask, **given)[0])
    assert torch.allclose(outs[1], outs[0], atol=1e-12)
    others = {"dropout", "bias"} & call.keys() or queries or length > attention.KEPT_KEYS
    assert bool(asked) == bool(others)
    with pytest.raises(ValueError, match="softcap"):
        products.attention_forward(module, query, key, value, mask, softcap=5.0)


@pytest.fixture(autouse=True)
def own_times(tmp_path, monkeypatch):
    """No choice is taken from what this machine once timed."""
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(products, "race", lambda *_: (2.0, 1.0))
    before = attention.choose_products(False)
    yield
    attention.choose_products(before)


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_vl"])
def test_a_run_has_the_same_loss_and_gradients(tmp_path, kind, fast):
    engine, setting, work = workplace(tmp_path, kind=kind)
    (batch,) = batches(engine)
    plain = gradients(work, batch)
    before = setting.adapted.backbone.model.config.get_text_config()._attn_implementation
    work = put_in(setting, work, products.CANDIDATE)
    assert setting.adapted.backbone.model.config.get_text_config()._attn_implementation == products.NAME
    ours = gradients(work, batch)
    assert abs(ours[0] - plain[0]) <= 1e-5 * plain[0] and distance(ours[1], plain[1]) <= 1e-5
    work.release()
    assert setting.adapted.backbone.model.config.get_text_config()._attn_implementation == before
    assert gradients(work, batch)[0] == plain[0]


def test_answers_are_generated_as_before(tmp_path, fast):
    engine, setting, work = workplace(tmp_path)
    inputs = batches(engine)[0].inputs
    model = work.adapted.model.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    put_in(setting, work, products.CANDIDATE)
    assert torch.equal(model.generate(**inputs, **options), plain)


def test_the_faster_kernel_is_chosen(tmp_path, monkeypatch):
    _, setting, work = workplace(tmp_path)
    monkeypatch.setattr(products, "race", lambda *_: (1.0, 0.9))
    with pytest.raises(NotHere, match="1000.0 ms"):
        products.CANDIDATE.install(setting, work)


def test_both_sides_of_the_race_are_timed(tmp_path):
    _, setting, _ = workplace(tmp_path)
    times = products.race(setting.adapted.backbone.model.config.get_text_config(), torch.bfloat16, length=16)
    assert all(seconds > 0 for seconds in times)


def test_rms_norm_by_differences():
    weight = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-5), (draw(3, 5),))


def test_bf16_norm_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64).bfloat16().requires_grad_(False)
    norm.weight.data = torch.rand(64).bfloat16()
    x = torch.randn(50, 64).bfloat16().requires_grad_()
    eps = eps_of(norm)
    assert eps is not None and is_rms_norm(norm, eps)
    ours, theirs, slope = rms_norm(x, norm.weight, eps), norm(x), torch.randn(50, 64).bfloat16()
    assert torch.equal(ours, theirs)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(rms_norm(wide, norm.weight.double(), eps), wide, slope.double())
    errors = [(torch.autograd.grad(one, x, slope)[0] - truth).norm() for one in (ours, theirs)]
    assert errors[0] <= 1.01 * errors[1]


def test_small_states_feel_eps():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64, eps=1e-5).requires_grad_(False)
    x = torch.randn(4, 64) * 1e-3
    assert torch.allclose(rms_norm(x, norm.weight, 1e-5), norm(x), rtol=1e-5)


def test_another_norm_is_not_taken_for_one():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    gemma = GemmaRMSNorm(8)
    nn.init.normal_(gemma.weight)
    assert eps_of(gemma) is not None and not is_rms_norm(gemma, 1e-6)
    assert eps_of(nn.LayerNorm(8)) is None and eps_of(nn.Linear(8, 1, bias=False)) is None


def test_norms_of_a_run(tmp_path):
    engine, setting, work = workplace(tmp_path)
    (batch,) = batches(engine)
    plain = gradients(work, batch)
    work = put_in(setting, work, fused_norms.CANDIDATE)
    assert sum(hasattr(module, "mmft_eps") for module in work.adapted.model.modules()) == 5
    fast = gradients(work, batch)
    assert abs(fast[0] - plain[0]) <= 1e-6 * plain[0] and distance(fast[1], plain[1]) <= 1e-5
    norm = next(module for module in work.adapted.model.modules() if hasattr(module, "mmft_eps"))
    norm.weight.requires_grad_()
    norm(torch.randn(2, len(norm.weight), requires_grad=True)).square().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.any(), "a weight that is trained later has its gradient"
    norm.weight.requires_grad_(False)
    work.release()
    assert not any(hasattr(module, "mmft_eps") for module in work.adapted.model.modules())
    for norm in (module for module in work.adapted.model.modules() if eps_of(module)):
        norm.weight.requires_grad_()
    assert not fused_norms.holds(replace(setting))[0]
