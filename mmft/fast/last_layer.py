"""The last layer's own products on supervised rows only: nobody reads what it makes of the others.

Keys and values of a last decoder layer are needed of every token; its output only where the head looks. So the layer's
MLP and its attention's output projection are given those rows, and their outputs go back into place among zeros. Only
what mixes no positions is cut, and that the layer is the last one, and that the head's rows stay what they were, is
seen in a forward of a real row before training. Saves `1 - supervised / tokens` of these modules in both directions:
about 0.8 of a layer. Price: two small copies a forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.adapters.build import set_modes
from mmft.data.collate import Batch
from mmft.data.render import IGNORED
from mmft.errors import MmftError
from mmft.fast.plan import Candidate, NotHere, Setting, Work
from mmft.fast.probe import autocast_of, probe_batch
from mmft.objectives.build import output_head
from mmft.objectives.sft import head_on_rows
from mmft.recipe.methods import METHODS

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Largest difference of logits relative to the largest logit; products of fewer rows may round otherwise."""
ROUGH = 2e-2
PROJECTIONS = ("o_proj", "out_proj", "dense")


@dataclass
class Rows:
    """The rows that the head will read (batch, length), of the batch that is being computed; `cut` counts the modules
    that were given only these."""

    mask: Tensor | None = None
    index: Tensor | None = None
    cut: int = 0

    def take(self, mask: Tensor | None) -> None:
        """From here on these; None, or none at all: every row."""
        index = None if mask is None else mask.flatten().nonzero().flatten()
        here = index is not None and len(index) > 0
        self.mask, self.index = (mask, index) if here else (None, None)

    def fits(self, x: Any) -> bool:
        """Whether x holds one state for each token of the batch, in a forward whose gradient is wanted."""
        return (
            self.mask is not None
            and torch.is_grad_enabled()
            and isinstance(x, Tensor)
            and x.dim() == 3
            and x.shape[:2] == self.mask.shape
        )


def target_rows(labels: Tensor) -> Tensor:
    """Positions (batch, length) whose next token is a target."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)


def on_rows(module: nn.Module, rows: Rows) -> Callable[[], None]:
    """Give `module` only the rows; its output has zeros elsewhere. Returns what takes it back."""
    given: list[torch.Size | None] = [None]  # of the call that is open

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        given[0] = args[0].shape if args and rows.fits(args[0]) else None
        if given[0] is None:
            return None
        x = args[0]
        rows.cut += 1
        assert rows.index is not None
        return (x.flatten(0, 1).index_select(0, rows.index)[None], *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        shape = given[0]
        if shape is None:
            return out
        assert rows.index is not None
        whole = out.new_zeros((shape[0] * shape[1], out.shape[-1]))
        return whole.index_copy(0, rows.index, out[0]).view(*shape[:2], -1)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def take_back() -> None:
        for handle in handles:
            handle.remove()

    return take_back


def layers_of(setting: Setting) -> list[nn.Module]:
    """The language model's layers: the longest list of modules with an `mlp`."""
    parts = setting.adapted.backbone.parts
    found: list[nn.Module] = []
    for name, module in setting.adapted.backbone.model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(found):
            inner = list(module)
            if all(isinstance(getattr(one, "mlp", None), nn.Module) for one in inner):
                found = inner if parts.part_of(f"{name}.0.mlp.weight") == "language" else found
    return found


def row_wise(layer: nn.Module) -> list[nn.Module]:
    """The modules of a layer that mix no positions, stand behind its attention and are worth it."""
    found = [layer.mlp]
    attention = getattr(layer, "self_attn", None)
    found += [one for name in PROJECTIONS if isinstance(one := getattr(attention, name, None), nn.Module)][:1]
    return found  # type: ignore[return-value]


def holds(setting: Setting) -> tuple[bool, str]:
    """Whether only supervised rows are read, and there is a last layer."""
    if setting.custom or setting.recipe.objective.name != "sft":
        return False, "the loss of this objective chooses its own rows"
    if setting.adapted.backbone.model.config.is_encoder_decoder:
        return False, "a decoder beside an encoder is not looked into"
    if METHODS[setting.recipe.adapter.method].place == "prompt":
        return False, "virtual tokens stand before the rows of the labels"
    if setting.recipe.adapter.lora_dropout:
        return False, "adapter.lora_dropout draws by the number of rows, so the numbers would be others"
    layers = layers_of(setting)
    if not layers:
        return False, "no list of language layers with an mlp"
    return True, f"only supervised rows leave the last of {len(layers)} layers (proven on a real row before training)"


def saves(setting: Setting) -> str:
    """The share of the language layers' weights."""
    layers = layers_of(setting)
    cut = sum(value.numel() for module in row_wise(layers[-1]) for value in module.parameters())
    total = sum(value.numel() for layer in layers for value in layer.parameters())
    return f"the products of {cut / max(total, 1):.1%} of the language layers on positions without loss"


def install(setting: Setting, work: Work) -> Work:
    """Hooks on the last layer's modules. Raises NotHere where the head's rows do not stay what they were."""
    rows, layer = Rows(), layers_of(setting)[-1]
    set_modes(setting.adapted)
    for module in row_wise(layer):
        if any(isinstance(one, nn.Dropout) and one.p > 0 and one.training for one in module.modules()):
            raise NotHere("dropout is active in the last layer and draws by the number of rows")
    undo = [on_rows(module, rows) for module in row_wise(layer)]

    def take_back() -> None:
        for one in undo:
            one()

    try:
        _prove(setting, work, layer, rows)
    except BaseException:
        take_back()
        raise
    inner = work.prepare

    def prepare(batch: Batch) -> Batch:
        batch = inner(batch)
        rows.take(target_rows(batch.labels))
        return batch

    return replace(work, prepare=prepare, undo=(*work.undo, take_back))


def _prove(setting: Setting, work: Work, layer: nn.Module, rows: Rows) -> None:
    batch = probe_batch(setting, work)
    if batch is None or not batch.supervised:
        raise NotHere("no row to try it on")
    model, wanted = work.adapted.model, target_rows(batch.labels)
    called: list[nn.Module] = []
    handles = [one.register_forward_pre_hook(lambda module, _: called.append(module)) for one in layers_of(setting)]
    was = [(one, one.training) for one in model.modules()]
    model.eval()
    try:
        with torch.enable_grad(), autocast_of(setting):
            found = []
            for mask in (None, wanted):
                rows.take(mask)
                with head_on_rows(output_head(model, where="train.fast"), wanted):
                    found.append(model(**batch.inputs, use_cache=False).logits.detach().float())
    except (MmftError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise NotHere(f"{type(layer).__name__} refuses some of its rows: {type(error).__name__}") from error
    finally:
        rows.take(None)
        for handle in handles:
            handle.remove()
        for one, training in was:
            one.training = training
    if called[-1:] != [layer] or called.count(layer) != 2 or rows.cut != len(row_wise(layer)):
        raise NotHere(f"{type(layer).__name__} is not called once, as the last layer")
    dtype = torch.bfloat16 if setting.recipe.train.bf16 else setting.adapted.backbone.model.dtype
    off = float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp_min(1e-9))
    if not off <= TOLERANCE.get(dtype, ROUGH):
        raise NotHere(f"the head's rows change by {off:.1e} of the largest logit")


CANDIDATE = Candidate("last_layer", holds, saves, install)
