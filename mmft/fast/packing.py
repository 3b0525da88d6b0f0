"""Packing: the rows of a step behind one another instead of padded (`data.packing`), each attending to itself alone.

Where a line of rows is not the same computation the rows of a step are sorted by length into its forwards instead.
Which of the two it is comes from the model itself: before training a few of the
shortest rows are computed in a line and padded, and once more in the line with the first row's text changed, which no
other row may notice; for sorting, each of them alone and padded. Nothing goes by a family's name.

Saves: the padding of every forward, and forwards where fewer hold a step's rows. Price: three forwards of three short
rows at the start, and the order of the sums (the last bits of a loss differ from the padded batch's).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmft.adapters.build import Adapted, set_modes
from mmft.data.collate import Batch, collate
from mmft.data.loader import RowRenderer
from mmft.data.order import StepPlan
from mmft.data.packing import (
    Layout,
    PackedRenderer,
    PackPlan,
    Positions,
    RowSizes,
    pack,
    plain_positions,
    row_sizes,
)
from mmft.data.render import IGNORED, Rendered, Renderer
from mmft.errors import RecipeError
from mmft.fast import packed_attention
from mmft.fast.plan import Candidate, FastPlan, NotHere, Setting, Work
from mmft.objectives.build import output_head, virtual_tokens
from mmft.objectives.sft import head_on_rows
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import Recipe

PROOF_ROWS = 3
LOOKED_AT = 64
"""Rows of which the shortest go into the proof."""
STEPS_LOOKED_AT = 32
"""Steps whose padding is counted for the plan."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative difference of a position's logits; 16-bit types are held to a multiple of their own noise."""
NOISE = 4.0
ROUGH = 0.05
"""Largest relative difference in 16 bits between a row alone and in a padded batch."""
_REFUSES = ("an encoder-decoder reads its text twice", "virtual tokens stand before a forward, not before each row")


@dataclass(frozen=True)
class RopeIndex:
    """Positions of a row by the model's own `get_rope_index` (M-RoPE: time, height and width of a picture's token)."""

    index: Callable[..., Any]

    def __call__(self, row: Rendered) -> Tensor:
        """(3, T)."""
        names = inspect.signature(self.index).parameters
        ids = row.input_ids[None]
        given = {name: value for name, value in row.media.items() if name in names}
        if "mm_token_type_ids" in names:
            given.setdefault("mm_token_type_ids", torch.zeros_like(ids))
        if "attention_mask" in names:
            given["attention_mask"] = torch.ones_like(ids)
        found: Tensor = self.index(input_ids=ids, **given)[0]
        return found[:, 0]


def positions_of(model: nn.Module) -> Positions:
    """What gives the positions of a row."""
    for module in model.modules():
        index = getattr(module, "get_rope_index", None)
        if index is not None:
            return RopeIndex(index)
    return plain_positions


def by_structure(setting: Setting) -> str:
    """Why rows cannot stand in a line here, as far as the structure tells; empty where it does not forbid it."""
    if setting.adapted.backbone.model.config.is_encoder_decoder:
        return _REFUSES[0]
    return _REFUSES[1] if METHODS[setting.recipe.adapter.method].place == "prompt" else ""


def by_recipe(recipe: Recipe, renderer: RowRenderer | None, *, custom: bool = False) -> str:
    """Why rows may not be dealt out to other forwards, as far as the recipe tells; empty where they may."""
    if recipe.train.packing is False:
        return "switched off by train.packing"
    if recipe.train.fast is False or (recipe.train.fast is not True and "packing" not in recipe.train.fast):
        return "switched off by train.fast"
    if custom or recipe.objective.name != "sft":
        return "only the loss of answers (sft) is known to be a sum over rows however they are batched"
    if not isinstance(renderer, Renderer):
        return "there is no processor at hand that tells the lengths of rows"
    if recipe.adapter.lora_dropout:
        return "adapter.lora_dropout draws by the shape of a batch, so the numbers would be others"
    return ""


def holds(setting: Setting) -> tuple[bool, str]:
    """Whether the loss is a sum over rows whose forwards may be cut anew."""
    refused = by_recipe(setting.recipe, setting.renderer, custom=setting.custom)
    if refused:
        return False, refused
    why = by_structure(setting)
    if why:
        return True, f"rows sorted by length within a step: {why}"
    return True, "rows behind one another within a step, each seeing itself alone; proven on this model at the start"


def saves(setting: Setting) -> str:
    """Padding and forwards of the first steps, plain and packed."""
    return _saved(setting, "buckets" if by_structure(setting) else "packs")


def _saved(setting: Setting, layout: Layout) -> str:
    if setting.steps is None or not isinstance(setting.renderer, Renderer) or not setting.samples:
        return ""
    plan = setting.steps
    steps = range(min(STEPS_LOOKED_AT, -(-plan.rows // plan.rows_per_step)))
    rows = sorted({row for step in steps for row, _ in plan.step_rows(step)})
    sizes = row_sizes(setting.renderer, setting.samples, only=rows)
    packed = PackPlan.of(plan, sizes, layout=layout)
    real = sum(int(sizes.tokens[row]) for step in steps for row, _ in plan.step_rows(step))
    plain, calls = padded(plan, sizes, steps)
    then, fewer = padded(packed, sizes, steps) if layout == "buckets" else (real, forwards(packed, steps))
    return (
        f"padding {1 - real / plain:.0%} -> {1 - real / then:.0%} of the tokens, "
        f"forwards {calls / len(steps):.3g} -> {fewer / len(steps):.3g} a step"
    )


def padded(plan: StepPlan, sizes: RowSizes, steps: range) -> tuple[int, int]:
    """Tokens of padded forwards, padding included, and their number."""
    found = [[sizes.tokens[row] for row, _ in micro.rows] for step in steps for micro in _all(plan, step)]
    return sum(int(max(rows)) * len(rows) for rows in found), len(found)


def forwards(plan: StepPlan, steps: range) -> int:
    """Forwards of some steps over all ranks."""
    return sum(len(_all(plan, step)) for step in steps)


def _all(plan: StepPlan, step: int) -> list[Any]:
    micros = [plan.micro_batch_at(step, index) for index in range(plan.micro_per_step)]
    return [micro for micro in micros if micro.rows]


def install(setting: Setting, work: Work) -> Work:
    """Lines of rows where the model passes the proof, else rows sorted by length. Raises NotHere if neither helps."""
    assert work.steps is not None and isinstance(work.renderer, Renderer)
    pixels = setting.renderer if isinstance(setting.renderer, Renderer) else work.renderer  # the proof knows no store
    noisy = _dropout(setting.adapted)
    if noisy:
        raise NotHere(f"{noisy} is active and draws by the shape of a batch")
    sizes = row_sizes(pixels, setting.samples)
    why = by_structure(setting)
    if not why:
        positions = positions_of(setting.adapted.backbone.model)
        undo, why = switch(setting.adapted.backbone.model)
        if not why:
            try:
                why = prove(setting, pixels, sizes, positions)
            except BaseException:
                undo()
                raise
        if not why:
            steps = PackPlan.of(work.steps, sizes, layout="packs")
            renderer = PackedRenderer(work.renderer, positions)
            return replace(work, renderer=renderer, steps=steps, undo=(*work.undo, undo))
        undo()
    if setting.recipe.train.packing is True:
        raise NotHere(why)
    again = prove_sorted(setting, pixels, sizes)
    if again:
        raise NotHere(f"{why}; and {again}")
    if work.steps.micro_per_step == 1:
        raise NotHere(f"{why}; a step is one forward, so its rows cannot be sorted by length into several")
    notes = {**work.notes, "packing": (f"rows sorted by length within a step: {why}", _saved(setting, "buckets"))}
    return replace(work, steps=PackPlan.of(work.steps, sizes, layout="buckets"), notes=notes)


def _dropout(adapted: Adapted) -> str:
    """The name of a module whose dropout is active in training; empty where none is."""
    set_modes(adapted)
    for name, module in adapted.model.named_modules():
        rates = [getattr(module, "p", 0.0)] if isinstance(module, nn.Dropout) else []
        rates += [getattr(module, key, 0.0) for key in ("attention_dropout", "dropout_p", "dropout")]
        if module.training and any(isinstance(rate, float) and rate > 0 for rate in rates):
            return name or type(module).__name__
    return ""


def switch(model: Any) -> tuple[Callable[[], None], str]:
    """Give the language model the attention of lines; towers keep theirs. How to take it back, and why it cannot be."""
    text = model.config.get_text_config(decoder=True)
    owner = next((one for one in model.modules() if isinstance(one, PreTrainedModel) and one.config is text), None)
    if owner is None:
        return _nothing, "no part of the model owns the language model's settings"
    before = text._attn_implementation
    packed_attention.register()

    def undo() -> None:
        owner.set_attn_implementation(before)

    try:
        owner.set_attn_implementation(packed_attention.NAME)
    except (ValueError, ImportError) as error:
        return _nothing, f"the attention cannot be chosen: {short(error)}"
    if text._attn_implementation != packed_attention.NAME:
        return _nothing, f"the attention of {type(owner).__name__} cannot be chosen"
    return undo, ""


def _nothing() -> None:
    return None


def prove(setting: Setting, renderer: Renderer, sizes: RowSizes, positions: Positions) -> str:
    """Why a line of rows is not what the padded batch computes; empty where it is."""
    longest, text = int(sizes.tokens.max()), setting.adapted.backbone.model.config.get_text_config(decoder=True)
    if (getattr(text, "attention_chunk_size", None) or longest) < longest:
        return f"attention in chunks of {text.attention_chunk_size} tokens"
    rows = [renderer.render(setting.samples[row]) for row in _chosen(sizes)]
    try:
        with torch.no_grad(), packed_attention.as_torch(), packed_attention.watched() as seen:
            plain = collate(rows, pad_token_id=setting.adapted.backbone.pad_token_id)
            wanted = scores(setting.adapted, plain, rows)
            alone = scores(setting.adapted, collate(rows[:1], pad_token_id=0), rows[:1])
            found = scores(setting.adapted, pack(rows, positions=positions), rows)
            changed = scores(setting.adapted, pack([_other(rows[0], renderer), *rows[1:]], positions=positions), rows)
    except Exception as error:  # whatever a family raises here, its rows are not put in a line
        return f"{type(setting.adapted.backbone.model).__name__} refuses a line of rows: {short(error)}"
    window = getattr(text, "sliding_window", None)
    if not seen.calls:
        return "the model does not call the attention that was chosen"
    if window and window < longest and getattr(text, "use_sliding_window", True) and window not in seen.windows:
        return f"the attention is not told of its window of {window} tokens"
    limit = allowed(setting.adapted, alone, wanted[:1])
    far, leak = distance(found, wanted), distance(changed[1:], found[1:])
    if not leak <= limit:
        return f"another row's text changes a row's scores by {leak:.1e}"
    return "" if far <= limit else f"scores of a line differ from those of the padded batch by {far:.1e}"


def prove_sorted(setting: Setting, renderer: Renderer, sizes: RowSizes) -> str:
    """Why rows may not be padded together in another way; empty where a row's scores do not depend on its company."""
    rows = [renderer.render(setting.samples[row]) for row in _chosen(sizes)]
    pad = setting.adapted.backbone.pad_token_id
    with torch.no_grad(), packed_attention.as_torch():
        together = scores(setting.adapted, collate(rows, pad_token_id=pad), rows)
        alone = [scores(setting.adapted, collate([row], pad_token_id=pad), [row])[0] for row in rows]
    far = distance(together, alone)
    limit = TOLERANCE.get(setting.adapted.backbone.model.dtype, ROUGH)
    return "" if far <= limit else f"a row's scores change by {far:.1e} with the rows it is padded with"


def _chosen(sizes: RowSizes) -> list[int]:
    """Of the first rows the shortest with each number of pictures, and then the shortest of all."""
    order = sorted(range(min(LOOKED_AT, len(sizes.tokens))), key=lambda row: (int(sizes.tokens[row]), row))
    kinds = {int(sizes.media[row]): row for row in reversed(order)}
    first = sorted(kinds.values(), key=order.index)[:PROOF_ROWS]
    chosen = (first + [row for row in order if row not in first])[:PROOF_ROWS]
    return chosen if len(chosen) > 1 else chosen * 2


def _other(row: Rendered, renderer: Renderer) -> Rendered:
    """The row with each word token replaced by its neighbour among them; media tokens and special tokens stay, since
    families find their pictures by them."""
    special = torch.tensor(sorted(renderer.tokenizer.all_special_ids))
    words = (~torch.isin(row.input_ids, torch.cat((special, renderer.media_ids)))).nonzero()[:, 0]
    ids = row.input_ids.clone()
    ids[words] = ids[words.roll(1)]
    ids[-1] = ids[-1] if bool(torch.isin(ids[-1], renderer.media_ids)) else ids[words[0]]  # what a neighbour would see
    return replace(row, input_ids=ids)


def scores(adapted: Adapted, batch: Batch, rows: Sequence[Rendered]) -> list[Tensor]:
    """Logits at the targets of each row, in float32 (float64)."""
    model, device = adapted.backbone.model, next(adapted.model.parameters()).device
    inputs = {key: value.to(model.dtype) if value.is_floating_point() else value for key, value in batch.inputs.items()}
    batch = replace(batch, inputs=inputs).to(device)
    targets = F.pad(batch.labels[:, 1:] != IGNORED, (0, 1), value=False)
    head, ahead = output_head(adapted.model, where="train.packing"), virtual_tokens(adapted.model)
    with head_on_rows(head, targets, ahead=ahead):
        logits = adapted.model(**batch.inputs, use_cache=False).logits
    counts = [int((row.labels[1:] != IGNORED).sum()) for row in rows]
    flat = logits.reshape(-1, logits.shape[-1])
    return [part.double() if part.dtype == torch.float64 else part.float() for part in flat.split(counts)]


def allowed(adapted: Adapted, alone: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far scores may be from the padded batch's: rounding in 32 bits; in 16 bits a multiple of what the padding
    alone changes, seen on a row without it, and at least of one rounding."""
    return TOLERANCE.get(adapted.backbone.model.dtype, 0.0) or NOISE * max(distance(alone, wanted), 2.0**-8)


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative difference of a position's logits."""
    return max(
        float(((one - two).norm(dim=-1) / two.norm(dim=-1).clamp_min(1e-9)).nan_to_num(torch.inf).max())
        for one, two in zip(found, wanted, strict=True)
    )


def short(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}" if str(error) else type(error).__name__


def demand(recipe: Recipe, plan: FastPlan) -> None:
    """Raise RecipeError where `train.packing: true` meets a run whose rows cannot be packed (`--plain` is no such)."""
    row = next((row for row in plan.rows if row.name == "packing"), None)
    if recipe.train.packing is True and recipe.train.fast is not False and row is not None and not row.on:
        raise RecipeError(
            f"rows cannot be packed: {row.reason}",
            where="train.packing",
            allowed="auto, which packs where it is exact and else sorts rows by length",
            do="set train.packing: auto",
        )


CANDIDATE = Candidate("packing", holds, saves, install)
