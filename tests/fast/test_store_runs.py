"""Runs with the feature store: killed and resumed, on two processes, whoever filled it: the same bytes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mmft.engine.loop import Engine
from mmft.errors import CheckpointError
from mmft.fast.known import fast_plan, install
from mmft.fast.plan import Setting, Work
from mmft.fast.slabs import cache_folder, evict
from mmft.recipe.schema import AdapterSection
from tests.engine.runs import STEPS, StopAt, make_engine
from tests.fast.small import small_recipe
from tests.runs import TRAIN_ONLY, adapter_sha, read_lines, run_process, write_recipe

ADAPTER = AdapterSection(lora_rank=4, lora_dropout=0.1)
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def stored_engine(folder: Path, run: str, *, callbacks: tuple[Any, ...] = (), workers: int = 0) -> tuple[Engine, Any]:
    """An engine whose rows go through the store below MMFT_CACHE, and what fills it."""
    plain, adapted = make_engine(folder, run=run, adapter=ADAPTER, dataloader_num_workers=workers)
    recipe = small_recipe(fast=["feature_store", "head_rows"])
    setting = Setting(recipe, adapted, plain.job.renderer, plain.job.samples)
    plan, work = install(fast_plan(setting), setting, Work(adapted, plain.job.objective, plain.job.renderer))
    assert plan.on("feature_store")
    job = replace(plain.job, renderer=work.renderer, prepare=work.prepare)
    return Engine(job, accelerator=Accelerator(cpu=True), journal=plain.journal, callbacks=callbacks), work.prepare


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in engine.params.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_to_the_same_bytes_whoever_filled_the_store(tmp_path, monkeypatch, workers):
    engine, filled = stored_engine(tmp_path, "whole")
    engine.fit(resume=False)
    whole = weights(engine)
    assert filled.misses == 16, "every picture once"
    for name in ("cold", "warm", "thrown out", "full"):
        if name in ("cold", "full"):
            monkeypatch.setenv("MMFT_CACHE", str(tmp_path / name))
        if name == "full":
            monkeypatch.setenv("MMFT_CACHE_SIZE", "1000")
        stopped, _ = stored_engine(tmp_path, name, callbacks=(StopAt(3),), workers=workers)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit(resume=False)
        if name == "thrown out":
            assert evict(cache_folder(), limit=0)
        again, after = stored_engine(tmp_path, name, workers=workers)
        assert again.fit(resume=True).step == STEPS
        found = weights(again)
        assert all(torch.equal(found[key], value) for key, value in whole.items()), name
        assert name != "warm" or after.misses == 0


def test_a_resumed_run_does_not_switch_it(tmp_path):
    import mmft

    changes = {**TRAIN_ONLY, "adapter.targets": ["language.attention"], "train.max_steps": 4}
    recipe = write_recipe(tmp_path, changes)
    mmft.train(recipe, quiet=True)
    run = tmp_path / "runs" / "tiny"
    (run / "report.json").unlink()
    with pytest.raises(CheckpointError, match="fast: .*feature_store"):
        mmft.train(recipe, ["train.fast=false"], resume=True, quiet=True)
    rows = [row for row in read_lines(run / "metrics.jsonl") if "loss" in row]
    plain = mmft.train(recipe, ["train.fast=false", "name=plain"], quiet=True)
    other = [row for row in read_lines(tmp_path / "runs" / "plain" / "metrics.jsonl") if "loss" in row]
    assert plain["training"]["steps"] == 4
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in other], rel=1e-5)


def test_two_processes_share_a_store_and_compute_what_one_does(tmp_path):
    changes = {**TRAIN_ONLY, "adapter.targets": ["language.attention"], "train.max_steps": 8}
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        2,
        "-m",
        "mmft",
        "train",
    ]
    one = run_process(sys.executable, "-m", "mmft", "train", write_recipe(tmp_path / "one", changes), **CPU)
    assert one.code == 0, one.err
    for name in ("warm", "cold"):
        cache = {"MMFT_CACHE": str(tmp_path / name)} if name == "cold" else {}
        two = run_process(*words, write_recipe(tmp_path / name, changes), **CPU, **cache)
        assert two.code == 0, two.err
        assert adapter_sha(tmp_path / name / "runs" / "tiny") == adapter_sha(tmp_path / "one" / "runs" / "tiny"), name
    assert len(list((tmp_path / "cold").rglob("*.slab"))) == 2, "each process wrote its own"
