"""Shared-prefix packing: several questions about one picture pay for the picture once.

Rows of a step that show the same pictures become [beginning | rest 1 | rest 2 …] in their line (`data.packing.pack`):
the beginning (all their pictures, and what text they have in common before and behind them) is computed once, each rest
attends to it and to itself, and its positions go on from it. In a causal model nothing in the beginning depends on what
follows, so every number of every row is the one it has alone. No target lies in the beginning, and the token before a
row's first target lies in its rest: a shared one would be the predictor of several rows.

Saves: (k - 1) beginnings and pictures for k rows of one picture in a step. They meet there by chance, or always with
`train_sampling_strategy: group_by_media`. Price: a small mask per beginning, and three forwards of two rows at the
start for the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mmft.data.collate import collate
from mmft.data.order import StepPlan
from mmft.data.packing import PackedRenderer, PackPlan, pack, row_sizes, shown_alike
from mmft.data.render import Renderer
from mmft.data.sample import Sample
from mmft.fast import packing
from mmft.fast.plan import Candidate, NotHere, Setting, Work

_HINT = "; with train.train_sampling_strategy: group_by_media rows of a picture would always meet"


def holds(setting: Setting) -> tuple[bool, str]:
    """Whether rows can stand in a line, and some rows of a step show the same pictures."""
    on, reason = packing.holds(setting)
    if not on or packing.by_structure(setting):
        return False, f"rows do not stand in a line: {packing.by_structure(setting) or reason}"
    if any(sample.augment is not None for sample in setting.samples):
        return False, "data.augmentation changes the picture of every row on its own"
    if setting.recipe.data.over_length == "shrink_images":
        return False, "data.over_length: shrink_images makes a picture's size depend on its question"
    repeated = _repeated(setting.samples)
    if not repeated:
        return False, "every row shows pictures of its own, or none"
    grouped = setting.recipe.train.train_sampling_strategy == "group_by_media"
    share = f"{repeated} of {len(setting.samples)} rows show pictures that another row shows too"
    if setting.steps is not None and not _met(setting.steps, setting.samples):
        return False, f"{share}, but no two in one step{'' if grouped else _HINT}"
    return True, f"{share}{'' if grouped else _HINT}"


def _repeated(samples: Sequence[Sample]) -> int:
    shown = shown_alike([sample.media for sample in samples])
    counts = np.bincount(shown[shown >= 0]) if (shown >= 0).any() else np.zeros(0, int)
    return int(counts[counts > 1].sum())


def _met(plan: StepPlan, samples: Sequence[Sample]) -> int:
    """Rows of the first steps that show what an earlier row of their step shows."""
    shown = shown_alike([sample.media for sample in samples])
    found = 0
    for step in _first(plan):
        seen = [number for row, _ in plan.step_rows(step) if (number := int(shown[row])) >= 0]
        found += len(seen) - len(set(seen))
    return found


def _first(plan: StepPlan) -> range:
    return range(min(packing.STEPS_LOOKED_AT, -(-plan.rows // plan.rows_per_step)))


def saves(setting: Setting) -> str:
    """Tokens and pictures of the first steps, packed alone and with shared beginnings."""
    if setting.steps is None or not isinstance(setting.renderer, Renderer):
        return ""
    steps = _first(setting.steps)
    rows = sorted({row for step in steps for row, _ in setting.steps.step_rows(step)})
    sizes = row_sizes(setting.renderer, setting.samples, only=rows)
    counts = []
    for share in (False, True):
        plan = PackPlan.of(setting.steps, sizes, layout="packs", share=share)
        found = [plan.size_of(one) for step in steps for one in plan.packs(step)]
        counts.append([sum(each) for each in zip(*found, strict=True)])
    (tokens, media), (fewer, shown) = counts
    return f"{1 - fewer / tokens:.0%} of the tokens, {1 - shown / max(media, 1):.0%} of the pictures"


def install(setting: Setting, work: Work) -> Work:
    """Shared beginnings in the lines. Raises NotHere where rows do not stand in a line, or a shared one fails."""
    if not isinstance(work.renderer, PackedRenderer) or not isinstance(work.steps, PackPlan):
        raise NotHere("rows do not stand in a line here")
    why = prove(setting, work.renderer)
    if why:
        raise NotHere(why)
    assert work.steps.sizes is not None
    steps = PackPlan.of(work.steps, work.steps.sizes, layout="packs", share=True)
    return replace(work, renderer=work.renderer.sharing(), steps=steps)


def prove(setting: Setting, renderer: PackedRenderer) -> str:
    """Why two rows with a shared beginning are not what the padded batch computes; empty where they are."""
    inner = setting.renderer if isinstance(setting.renderer, Renderer) else renderer.inner
    rows = [inner.render(sample) for sample in _pair(setting.samples)]
    shared = pack(rows, positions=renderer.positions, shown=[0, 0], media_ids=renderer.inner.media_ids)
    if not bool(shared.inputs["attention_mask"][..., 3].any()):
        return "two rows of one picture have no beginning in common that holds it"
    try:
        with torch.no_grad():
            plain = collate(rows, pad_token_id=setting.adapted.backbone.pad_token_id)
            wanted = packing.scores(setting.adapted, plain, rows)
            alone = packing.scores(setting.adapted, collate(rows[:1], pad_token_id=0), rows[:1])
            found = packing.scores(setting.adapted, shared, rows)
    except Exception as error:  # as for packing: whatever it raises, it is left out
        return f"{type(setting.adapted.backbone.model).__name__} refuses a shared beginning: {packing.short(error)}"
    far = packing.distance(found, wanted)
    if far <= packing.allowed(setting.adapted, alone, wanted[:1]):
        return ""
    return f"scores behind a shared beginning differ from those of the padded batch by {far:.1e}"


def _pair(samples: Sequence[Sample]) -> list[Sample]:
    """The first two rows that show the same pictures."""
    first: dict[int, Sample] = {}
    for sample, number in zip(samples, shown_alike([one.media for one in samples]).tolist(), strict=True):
        if number >= 0 and number in first:
            return [first[number], sample]
        first[number] = sample
    raise NotHere("no two rows show the same pictures")


CANDIDATE = Candidate("shared_prefix", holds, saves, install)
