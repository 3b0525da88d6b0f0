"""Which optimisations a run uses, and why: one plan for `mmft plan`, the run and `mmft verify-fast`.

    plan = fast_plan(setting)                          # from structure alone: the model may be on the meta device
    plan, work = install(plan, setting, work)          # one that fails its own proof on the real model is switched off
    ...
    work.release()                                     # the model is as it was

An optimisation is a `Candidate` entered in `mmft/fast/known.py`: `holds` says whether it is exact here, `saves` what
it should save, `install` puts it in (and raises `NotHere` when a proof on the real model fails), `without` is what a
plain run does in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmft.adapters.build import Adapted
from mmft.data.collate import Batch
from mmft.data.loader import RowRenderer
from mmft.data.order import StepPlan
from mmft.data.sample import Sample
from mmft.objectives.base import Objective
from mmft.recipe.schema import Recipe


@dataclass(frozen=True)
class Optimisation:
    """One row of the plan: why it holds here or not, and what it saves (an estimate). `bits`: the last bits of a loss
    may differ with it, so that a run is not resumed across its switch."""

    name: str
    on: bool
    reason: str
    saves: str
    bits: bool = True


@dataclass(frozen=True)
class FastPlan:
    """All optimisations that are known, in the order they are put in."""

    rows: tuple[Optimisation, ...]

    def on(self, name: str) -> bool:
        """Whether the optimisation is used."""
        return any(row.name == name and row.on for row in self.rows)

    @property
    def digest(self) -> str:
        """What a resumed run must share: the names of those in use that may change a bit."""
        return " ".join(sorted(row.name for row in self.rows if row.on and row.bits))

    def table(self) -> list[list[str]]:
        """Rows of name, on or off, reason, saving."""
        return [[row.name, "on" if row.on else "off", row.reason, row.saves if row.on else ""] for row in self.rows]


@dataclass(frozen=True)
class Setting:
    """What an optimisation looks at. `renderer` is None where no processor is at hand; `custom`: the objective is the
    user's own, of which nothing is known but that it calls the model with `batch.inputs`; `evals`: rows whose loss is
    looked at while training; `sharded`: the language layers are cut up over the ranks."""

    recipe: Recipe
    adapted: Adapted
    renderer: RowRenderer | None
    samples: Sequence[Sample] = ()
    world: int = 1
    custom: bool = False
    steps: StepPlan | None = None
    evals: Sequence[Sample] = ()
    sharded: bool = False


def _as_it_is(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class Work:
    """What training works with, which an optimisation may replace (`dataclasses.replace`). `prepare` is what a batch on
    the model's device goes through last; `steps` the rows of its forwards; `notes` (reason, saving) that a proof found;
    `undo` what has to be taken back, done last first."""

    adapted: Adapted
    objective: Objective
    renderer: RowRenderer
    steps: StepPlan | None = None
    prepare: Callable[[Batch], Batch] = _as_it_is
    notes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    undo: tuple[Callable[[], None], ...] = field(default=(), repr=False)

    def release(self) -> None:
        """Take everything out of the model again."""
        for one in reversed(self.undo):
            one()


class NotHere(Exception):
    """Raised by an `install` whose proof on the real model fails; its text is the plan's reason."""


def _unchanged(setting: Setting, work: Work) -> Work:
    return work


@dataclass(frozen=True)
class Candidate:
    """An optimisation: the functions that decide on it, estimate it and put it in (see the module). `whole`: why it is
    off where the language layers are cut up over the ranks."""

    name: str
    holds: Callable[[Setting], tuple[bool, str]]
    saves: Callable[[Setting], str]
    install: Callable[[Setting, Work], Work] = _unchanged
    without: Callable[[Setting, Work], Work] = _unchanged
    bits: bool = True
    whole: str = ""


def fast_plan(setting: Setting, candidates: Sequence[Candidate]) -> FastPlan:
    """The plan of a run: what holds and is not switched off by `train.fast`."""
    wanted: Any = setting.recipe.train.fast
    rows = []
    for one in candidates:
        on, reason = one.holds(setting)
        if on and setting.sharded and one.whole:
            on, reason = False, one.whole
        if wanted is False or (wanted is not True and one.name not in wanted):
            on, reason = False, "switched off by train.fast"
        rows.append(Optimisation(one.name, on, reason, one.saves(setting) if on else "", one.bits))
    return FastPlan(tuple(rows))


def install(plan: FastPlan, setting: Setting, work: Work, candidates: Sequence[Candidate]) -> tuple[FastPlan, Work]:
    """Put in what the plan says, in its order; the plan that is left, and what training works with.

    An exception other than `NotHere` takes everything out again.
    """
    known = {one.name: one for one in candidates}
    rows = []
    try:
        for row in plan.rows:
            candidate = known[row.name]
            try:
                work = (candidate.install if row.on else candidate.without)(setting, work)
            except NotHere as error:
                row = replace(row, on=False, reason=str(error), saves="")
                work = candidate.without(setting, work)
            reason, saving = work.notes.get(row.name, (row.reason, row.saves))
            row = replace(row, reason=reason, saves=saving)
            rows.append(row)
    except BaseException:
        work.release()
        raise
    return FastPlan(tuple(rows)), work
