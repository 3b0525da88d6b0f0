"""The plan: what holds, what a recipe switches off, what a failed proof leaves, what a resumed run must share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmft.data.render import Renderer
from mmft.fast.known import CANDIDATES
from mmft.fast.plan import Candidate, NotHere, Setting, Work, fast_plan, install
from mmft.objectives.build import build_sft
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import AdapterSection, ObjectiveSection
from mmft.recipe.section import FastName
from tests.engine.runs import make_engine


def recipe(**train: Any):
    fields = {"train": train} if train else {}
    return load_recipe({"name": "x", "model": "shipped:nano-vlm", "data": {"train": "shipped:y"}, **fields})


def candidate(name: str, *, holds: bool = True, bits: bool = True, log: list[str] | None = None, proof: bool = True):
    log = [] if log is None else log

    def put_in(setting: Setting, work: Work) -> Work:
        if not proof:
            raise NotHere("the proof fails here")
        log.append(f"+{name}")
        return replace(work, undo=(*work.undo, lambda: log.append(f"-{name}")))

    def without(setting: Setting, work: Work) -> Work:
        log.append(f"without {name}")
        return work

    return Candidate(name, lambda _: (holds, f"because {name}"), lambda _: "time", put_in, without, bits)


def setting(**train: Any) -> Setting:
    return Setting(recipe(**train), None, None)  # type: ignore[arg-type]


def work() -> Work:
    return Work(None, None, None)  # type: ignore[arg-type]


def test_every_known_optimisation_can_be_named():
    names = [one.name for one in CANDIDATES]
    assert len(set(names)) == len(names)
    assert set(names) <= set(FastName.__args__)


@pytest.mark.parametrize(("fast", "on"), [(True, {"head_rows", "packing"}), (False, set()), (["packing"], {"packing"})])
def test_the_recipe_switches(fast, on):
    known = [candidate("head_rows"), candidate("packing"), candidate("nf4_once", holds=False)]
    plan = fast_plan(setting(fast=fast), known)
    assert {row.name for row in plan.rows if row.on} == on
    assert [row[0] for row in plan.table()] == ["head_rows", "packing", "nf4_once"]
    assert plan.on("packing") == ("packing" in on)


def test_what_needs_whole_layers_is_off_where_they_are_cut_up():
    known = [replace(candidate("lora_fused"), whole="layers are gathered"), candidate("packing")]
    rows = fast_plan(replace(setting(), sharded=True), known).rows
    assert [(row.on, row.reason) for row in rows] == [(False, "layers are gathered"), (True, "because packing")]
    assert all(row.on for row in fast_plan(setting(), known).rows)
    off = {one.name for one in CANDIDATES if one.whole}
    assert off == {"lora_fused", "nf4_once", "norms_fused", "attention_products", "native_kernels"}


def test_only_what_may_change_a_bit_binds_a_resumed_run():
    plan = fast_plan(setting(), [candidate("packing"), candidate("head_rows", bits=False), candidate("compile")])
    assert plan.digest == "compile packing"
    assert fast_plan(setting(fast=False), [candidate("packing")]).digest == ""


def test_a_failed_proof_switches_off_and_what_was_put_in_is_taken_out():
    log: list[str] = []
    known = [candidate("packing", log=log), candidate("compile", log=log, proof=False), candidate("head_rows", log=log)]
    plan, done = install(fast_plan(setting(), known), setting(), work(), known)
    assert [(row.name, row.on) for row in plan.rows] == [("packing", True), ("compile", False), ("head_rows", True)]
    assert plan.rows[1].reason == "the proof fails here" and plan.digest == "head_rows packing"
    done.release()
    assert log == ["+packing", "without compile", "+head_rows", "-head_rows", "-packing"]


def test_an_error_while_putting_in_leaves_the_model_as_it_was():
    log: list[str] = []

    def broken(setting: Setting, work: Work) -> Work:
        raise ValueError("no")

    known = [candidate("packing", log=log), Candidate("compile", lambda _: (True, ""), lambda _: "", broken)]
    with pytest.raises(ValueError):
        install(fast_plan(setting(), known), setting(), work(), known)
    assert log == ["+packing", "-packing"]


def test_the_head_on_every_position_is_the_same_loss(tmp_path):
    """The plain twin: all logits, then the supervised ones."""
    engine, adapted = make_engine(tmp_path, adapter=AdapterSection(lora_rank=4))
    objective = build_sft(ObjectiveSection(), adapted.model)
    batch = next(iter(engine._steps()))[0]
    rows, every = objective.loss(adapted.model, batch), objective.on_every_position().loss(adapted.model, batch)
    assert torch.allclose(rows.sum, every.sum, rtol=1e-6) and rows.count == every.count
    assert rows.logs["correct"] == every.logs["correct"]
    assert isinstance(engine.job.renderer, Renderer)


def test_the_plan_of_a_real_recipe_says_why(tmp_path):
    _, adapted = make_engine(tmp_path, adapter=AdapterSection(lora_rank=4, targets=("language.attention",)))
    here = Setting(recipe(), adapted, None)
    rows = {row[0]: row for row in fast_plan(here, CANDIDATES).table()}
    assert rows["frozen_no_graph"][1] == "on" and "frozen weights lie before" in rows["frozen_no_graph"][2]
    assert rows["head_rows"][1] == "on"
    own = {row[0]: row for row in fast_plan(replace(here, custom=True), CANDIDATES).table()}
    assert own["head_rows"][1] == "off"
