"""Frozen blocks of two linear layers and an act whose first product takes the act with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mmft.fast import native_build, native_linear, native_mlp, native_product
from tests.fast.native import kernels, needs_kernels, units

pytestmark = needs_kernels
NAMES = {"tanh_gelu": "gelu_pytorch_tanh", "erf_gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu"}
"""Those of transformers."""


@pytest.fixture(autouse=True)
def library(monkeypatch):
    with kernels(monkeypatch) as chosen:
        yield chosen


class Mlp(nn.Module):
    """As a vision tower's."""

    def __init__(self, act: nn.Module, width: int = 32, hidden: int = 80) -> None:
        super().__init__()
        self.act, self.fc1, self.fc2 = act, nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.bfloat16().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Turned(Mlp):
    """Not the formula, of the same parts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.act(x)))


class Dropped(Mlp):
    """The formula only where it does not train."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Further(Mlp):
    """The formula, and a second output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), x  # type: ignore[return-value]


class Other(Mlp):
    """Of the same parts, for something that is no tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.pixels)  # type: ignore[attr-defined]


def rows(seed: int = 0) -> Tensor:
    return torch.randn((2, 40, 32), generator=torch.Generator().manual_seed(seed)).bfloat16()


def acts_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Acts of the kernel's products from now on."""
    found: list[str] = []

    def product(terms, **how):
        made = native_product.product(terms, **how)
        found.extend([] if made is None else [how["act"]])
        return made

    monkeypatch.setattr(native_mlp, "product", product)
    return found


@pytest.mark.parametrize("act", NAMES)
def test_a_block_is_torchs_within_a_unit_behind_the_act(act, monkeypatch):
    torch.manual_seed(0)
    block, x = Mlp(ACT2FN[NAMES[act]]), rows()
    plain, given = block(x), block.act(block.fc1(x))
    ((same, kind),) = native_mlp.put_in(nn.Sequential(block))
    assert same is block and kind is Mlp and block.mmft_mlp == ("fc1", "fc2", act)
    made = acts_made(monkeypatch)
    found = block(x)
    assert made == [act] and (found - plain).abs().max() <= 0.02 * plain.abs().max()
    inner = native_mlp._acted(block.fc1, x, act)
    assert inner.shape == given.shape and (units(inner, given) <= 1).double().mean() > 0.99
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block(x.float()), found)
    native_mlp.take_back([(block, kind)])
    assert type(block) is Mlp and not hasattr(block, "mmft_mlp") and torch.equal(block(x), plain)


def test_where_a_gradient_flows_it_is_the_blocks_own_forward(monkeypatch):
    torch.manual_seed(0)
    block, x = Mlp(nn.GELU()), rows().requires_grad_()
    (wanted,) = torch.autograd.grad(block(x).sum(), x)
    blocks = list(native_mlp.put_in(block))
    made = acts_made(monkeypatch)
    (found,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(found, wanted) and not made
    with torch.no_grad():
        block(x)
    assert made == ["erf_gelu"] and len(blocks) == 1


def test_what_the_kernel_does_not_take_is_the_blocks_own(monkeypatch):
    torch.manual_seed(0)
    block, x = Mlp(nn.GELU()), rows()
    few, wide = x[:1, :5], x.float()
    plain = block(few)
    list(native_mlp.put_in(block))
    made = acts_made(monkeypatch)
    assert torch.equal(block(few), plain)
    with pytest.raises(RuntimeError):
        block(wide)  # torch's own refusal of two types
    with pytest.raises(TypeError):
        block(x, x)
    native_build.choose(None)
    block(x)
    block.fc1.weight.requires_grad_(True)
    assert block(x).requires_grad and not made


def test_blocks_that_are_something_else_stay():
    torch.manual_seed(0)
    trained, watched, half, three = (Mlp(nn.GELU()) for _ in range(4))
    trained.fc2.weight.requires_grad_(True)
    watched.act.register_forward_hook(lambda *_: None)
    half.float()
    three.more = nn.Identity()
    others = {
        "a layer that trains": trained,
        "a hook on the act": watched,
        "in float32": half,
        "a fourth part": three,
        "another act": Mlp(nn.SiLU()),
        "an act of another rounding": Mlp(ACT2FN["gelu_new"]),
        "an act that trains": Mlp(nn.PReLU(dtype=torch.bfloat16)),
        "another order": Turned(nn.GELU(), hidden=32),
        "dropout": Dropped(nn.GELU()).eval(),
        "two outputs": Further(nn.GELU()),
        "not of rows": Other(nn.GELU()),
        "layers of other widths": nn.ModuleDict(
            {"one": nn.Linear(32, 48), "act": nn.GELU(), "two": nn.Linear(32, 32)}
        ).bfloat16().requires_grad_(False),
    }  # fmt: skip
    assert [name for name, block in others.items() if list(native_mlp.put_in(block))] == []
    assert not others["dropout"].training
    line = nn.Sequential(nn.Linear(32, 80), nn.ReLU(inplace=True), nn.Linear(80, 32)).bfloat16().requires_grad_(False)
    plain = line(rows())
    ((_, kind),) = native_mlp.put_in(line)
    assert kind is nn.Sequential and (line(rows()) - plain).abs().max() <= 0.02 * plain.abs().max()


@pytest.mark.parametrize("together", [True, False])
def test_it_goes_on_with_fast_layers(together):
    """The layers of a block are the kernel's too; a row says the same alone."""
    torch.manual_seed(0)
    block, x = Mlp(nn.GELU(approximate="tanh")), rows()
    list(native_mlp.put_in(block))
    if together:
        assert list(native_linear.put_in(block)) == [block.fc1, block.fc2]
    assert torch.equal(block(x)[1:], block(x[1:]))
