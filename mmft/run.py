"""The story of a run: recipe → backbone → adapters → data → objective → engine → export → evaluation → report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmft.adapters.build import build_adapters
from mmft.backbones.load import load_backbone
from mmft.data.stream_files import Fetch
from mmft.engine.sharding import asked, check_recipe, loading_device, shard
from mmft.kinds import kind_of
from mmft.kinds.custom import ObjectiveFactory, find_factory, find_fetch, find_rewards
from mmft.outcome import evaluate_stage, export_stage, keep_trained, report_stage, restore_trained
from mmft.recipe.load import load_recipe
from mmft.runfolder import find_run, open_run, read_json
from mmft.stages import calibration, load_datasets, make_accelerator, train_stage


def train(
    recipe: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    objective: str | ObjectiveFactory | None = None,
    rewards: Sequence[str | Callable[..., float]] = (),
    fetch: str | Fetch | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end; returns the report (an empty dict on ranks other than 0).

    `objective` (`FILE.py:NAME`, or a class or function of (model, recipe)) takes the place of the recipe's own.
    `rewards` (`FILE.py:NAME`, or functions of one attempt) take the place of `objective.rewards`. `fetch`
    (`FILE.py:NAME`, or a function of (url, path)) brings the shards of streamed sets that lie elsewhere.
    Raises MmftError of the kind that stopped it, and Interrupted (SystemExit) after a signal's checkpoint.
    """
    loaded = load_recipe(recipe, overrides)
    factory = find_factory(objective) if objective is not None else None
    own, bring = find_rewards(rewards), find_fetch(fetch)
    accelerator = make_accelerator(loaded.train)
    sharded = asked(accelerator.num_processes)
    if sharded:
        check_recipe(loaded, custom=factory is not None)
    rank = accelerator.process_index
    with open_run(loaded, resume=resume, overwrite=overwrite, rank=rank, quiet=quiet) as run:
        accelerator.wait_for_everyone()
        if resume and (done := read_json(run.report)).get("complete"):
            run.journal.say(f"{run.path} is complete; nothing was left to do")
            return done
        kind = kind_of(loaded)
        backbone = load_backbone(kind.base(loaded, run.path), loaded.quantization, device=loading_device(accelerator))
        datasets = replace(load_datasets(loaded, backbone.processor, run.journal, fetch=bring), rewards=own)
        seen = calibration(loaded, backbone, datasets)
        adapted = build_adapters(backbone, loaded.adapter, seed=loaded.train.seed, calibration=seen)
        adapted = kind.adapt(adapted, loaded)
        run.journal.table("trained", ["part", "what", "mode", "modules", "parameters"], adapted.table())
        if sharded:
            shard(adapted, accelerator, run.journal)
        train_stage(run, adapted, datasets, accelerator, resume=resume, factory=factory)
        report: dict[str, Any] = {}
        if accelerator.is_main_process:
            kind.settle(loaded, adapted, datasets)
            keep_trained(run, adapted)
            if sharded and (loaded.export.merge or datasets.evals):
                # That runs on this rank alone, which holds a part of the layers only.
                adapted = restore_trained(run, device=accelerator.device)
            merge = export_stage(run, adapted, datasets)
            evaluate_stage(run, adapted, datasets)
            report = report_stage(run, merge)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return report


def evaluate(path: str | Path, *, fetch: str | Fetch | None = None, quiet: bool = False) -> dict[str, Any]:
    """Answer a run's evaluation rows again with the models it kept; rewrites predictions and report. `fetch` as in
    `train`: shards whose rows are not known yet, or that rows of training are looked at of, are brought by it."""
    bring = find_fetch(fetch)
    run = find_run(path, quiet=quiet)
    adapted = restore_trained(run)
    datasets = load_datasets(run.recipe, adapted.backbone.processor, run.journal, fetch=bring)
    evaluate_stage(run, adapted, datasets)
    return report_stage(run, read_json(run.merge_report))
