"""All optimisations, in the order in which they are put in."""

from __future__ import annotations

from dataclasses import replace

from mmft.data.streaming import Streamed
from mmft.fast import (
    feature_store,
    fused_norms,
    head,
    head_rows,
    kernel_caches,
    last_layer,
    lora_fused,
    native_kernels,
    no_graph,
    packing,
    products,
    shared_prefix,
)
from mmft.fast.plan import Candidate, FastPlan, Setting, Work
from mmft.fast.plan import fast_plan as _fast_plan
from mmft.fast.plan import install as _install

CANDIDATES: tuple[Candidate, ...] = (
    kernel_caches.CANDIDATE,
    no_graph.CANDIDATE,
    products.CANDIDATE,
    native_kernels.CANDIDATE,
    head_rows.CANDIDATE,
    feature_store.CANDIDATE,
    packing.CANDIDATE,
    shared_prefix.CANDIDATE,
    head.CANDIDATE,
    last_layer.CANDIDATE,
    lora_fused.CANDIDATE,
    lora_fused.ONCE,
    fused_norms.CANDIDATE,
)
"""A new one is entered here, and its name in `mmft.recipe.section.FastName`."""


LOOK_AT_ROWS = (feature_store, packing, shared_prefix)
"""Those that go through all rows before training, which a stream does not allow."""


def _of_a_stream(_: Setting) -> tuple[bool, str]:
    return False, "the rows of a stream are not looked at before training"


def fast_plan(setting: Setting) -> FastPlan:
    """The plan over all that is known."""
    if not isinstance(setting.samples, Streamed):
        return _fast_plan(setting, CANDIDATES)
    out = [one.CANDIDATE for one in LOOK_AT_ROWS]
    return _fast_plan(setting, tuple(replace(one, holds=_of_a_stream) if one in out else one for one in CANDIDATES))


def install(plan: FastPlan, setting: Setting, work: Work) -> tuple[FastPlan, Work]:
    """Put in what the plan says."""
    return _install(plan, setting, work, CANDIDATES)
