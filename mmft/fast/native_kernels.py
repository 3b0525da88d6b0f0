"""Attention, norms, gates and products by kernels in C (`native/`), built by the machine's gcc, in bfloat16 on a CPU.

Torch's operators write every step of a softmax, a norm or a gate to memory and read it again; a kernel does not, and
its products of bfloat16 keep float32 sums, which no operator of torch gives out on a CPU. Each kernel stands behind the
function it takes the place of (`native_attention`, `native_rows`; layers and blocks of `native_linear`, `native_mlp`),
which goes on with torch for what is not its own: masks of padding, soft caps, windows, dropout on P, widths that are
not whole vectors, other types. They go in where attention is faster here by them than by what was chosen before. Price:
a second of gcc, once on a machine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmft.fast import native_build, native_linear, native_mlp, products
from mmft.fast.attention import products_chosen
from mmft.fast.line_attention import groups_of, line_attention
from mmft.fast.native_attention import Segment, fits, native_line, native_rows
from mmft.fast.native_product import product
from mmft.fast.plan import Candidate, NotHere, Setting, Work
from mmft.fast.probe import on_cpu
from mmft.fast.products import configs_of, seconds
from mmft.fast.timed import kept_times

NAME = "mmft_native"
OTHERS = ("sdpa", products.NAME)
"""Attention functions whose place the kernel takes; the packed one asks for it by itself."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; the arguments are those of its `sdpa` function."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = any(options.get(name) is not None for name in ("softcap", "position_bias", "s_aux"))
    lengths = query.shape[2] == key.shape[2] > 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = attention_mask is None and lengths and not special and not dropout and scale > 0
    if plain and fits(query, key, value):
        return native_rows(query, key, value, scale=scale, causal=bool(causal)).transpose(1, 2), None
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    other = products.NAME if products_chosen() else "sdpa"
    found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS[other](
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **options,
    )
    return found


def holds(setting: Setting) -> tuple[bool, str]:
    """On a CPU with vectors of bfloat16, a compiler, and steps computed in bfloat16."""
    if not on_cpu(setting):
        return False, "accelerators have kernels of their own"
    if not setting.recipe.train.bf16 and setting.adapted.backbone.model.dtype != torch.bfloat16:
        return False, "the kernels compute in bfloat16"
    reason = native_build.why_not()
    return reason is None, reason or "attention, norms and gates in one pass, built by this machine's gcc"


def saves(setting: Setting) -> str:
    """What the three parts save; attention's is measured."""
    return "most passes over memory that are no product; attention by a factor that is measured"


def race(text: Any, *, length: int = 256) -> tuple[float, float]:
    """Seconds of forward and backward of two rows by what was chosen before (or torch's kernel) and by the kernel."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    line: list[Segment] = [(0, length, 0, 0), (length, 2 * length, 0, 0)]
    query, key, value = (
        torch.randn((1, count, 2 * length, width), dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, groups, groups)
    )
    if not fits(query, key, value):
        raise NotHere(f"heads of width {width} are not whole vectors")
    slope = torch.randn((1, 2 * length, heads, width), dtype=torch.bfloat16)

    def before() -> None:
        if products_chosen():
            out = line_attention(query, key, value, groups_of(tuple(line)), scale=width**-0.5)
        else:
            q, k, v = (one[0].unflatten(1, (2, length)).transpose(0, 1) for one in (query, key, value))
            folded = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
            out = folded.permute(0, 2, 1, 3).reshape(slope.shape)
        torch.autograd.grad(out, (query, key, value), slope)

    def kernel() -> None:
        out = native_line(query, key, value, line, scale=width**-0.5)
        torch.autograd.grad(out, (query, key, value), slope)

    with torch.enable_grad():
        return seconds(before), seconds(kernel)


def wrong() -> str:
    """What this machine's gcc made of the sources that does not compute what torch does; empty where all of it does."""
    source = torch.Generator().manual_seed(0)
    x, weight, heads = (torch.randn(size, generator=source).bfloat16() for size in ((41, 96), (70, 96), (3, 41, 32)))
    made = product([(x, weight)], across=True)
    found = native_line(heads[None], heads[None], heads[None], [(0, 41, 0, 0)], scale=0.2).transpose(1, 2)
    wide = heads.double()
    scores = (0.2 * wide @ wide.transpose(1, 2)).masked_fill(torch.ones(41, 41).triu(1) > 0, float("-inf"))
    pairs = {
        "a product": (made, x.double() @ weight.double().t()),
        "attention": (found[0], torch.softmax(scores, -1) @ wide),
    }
    far = [
        name for name, (one, truth) in pairs.items() if one is None or not (one - truth).norm() < 0.01 * truth.norm()
    ]
    return " and ".join(far)


def install(setting: Setting, work: Work) -> Work:
    """Build, choose, and give attention to the kernel where it wins. Raises NotHere where it does not, or where the
    kernels cannot be built."""
    try:
        before = native_build.choose(native_build.library())
    except native_build.NoKernels as error:
        raise NotHere(str(error)) from None
    model = setting.adapted.backbone.model
    try:
        if wrong():
            raise NotHere(f"what gcc built computes {wrong()} wrongly here")
        was = _attention_goes_in(model)
    except BaseException:
        native_build.choose(before)
        raise

    blocks = list(native_mlp.put_in(model))
    layers = list(native_linear.put_in(model))

    def take_back() -> None:
        native_build.choose(before)
        native_linear.take_back(layers)
        native_mlp.take_back(blocks)
        if was:
            model.set_attn_implementation(was)

    return replace(work, undo=(*work.undo, take_back))


def _attention_goes_in(model: Any) -> dict[str, str]:
    """The functions whose place the kernel took, by sub-model."""
    text = model.config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        raise NotHere("the model's config tells no heads of attention")
    shape = f"{text.num_attention_heads} x {text.hidden_size}, {'products' if products_chosen() else 'sdpa'}"
    theirs, ours = kept_times(f"native attention {shape}", lambda: race(text))
    if theirs < products.WINS_BY * ours:
        raise NotHere(f"attention takes {theirs * 1e3:.1f} ms as it is, and {ours * 1e3:.1f} ms by the kernel")
    if not getattr(model, "_supports_attention_backend", False):
        return {}
    products.register(NAME, attention_forward)
    was = {name: one._attn_implementation for name, one in configs_of(model).items()}
    model.set_attn_implementation({name: NAME for name, one in was.items() if one in OTHERS})
    return was


CANDIDATE = Candidate(
    "native_kernels", holds, saves, install, whole="ranks that time it would run unlike numbers of forwards"
)
