"""One arm of `make bench` in a process of its own: trains some steps and prints its figures as a line of JSON.

Every arm gets the same folder, rows, order, adapters (mmft's own start), learning rate and batch. What is timed is the
wall clock from the end of step `WARM` on, data included; with several epochs each counts as often as it was gone
through (`Watch.figures`).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import build_adapters
from mmft.backbones.load import load_backbone
from mmft.data.loader import assemble
from mmft.quiet import quiet_upstream
from mmft.recipe.load import load_recipe
from mmft.runfolder import open_run
from mmft.stages import load_datasets, make_accelerator, plan_steps, train_stage
from tests.bench.watch import Watch


def recipe_of(given: dict[str, Any], folder: Path) -> Any:
    """The recipe that all arms share."""
    return load_recipe(
        {
            "name": "bench",
            "model": {"name_or_path": given["model"], "dtype": "bfloat16"},
            "adapter": {
                "targets": ["language.attention", "language.mlp"],
                "lora_rank": 16,
                "lora_alpha": 32,
            },
            "data": {"train": given["rows"], "max_length": 4096},
            "train": {
                "output_dir": str(folder),
                "per_device_train_batch_size": given["batch"],
                "gradient_accumulation_steps": 1,
                "max_steps": given["steps"],
                "learning_rate": 2e-4,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
                "bf16": True,
                "gradient_checkpointing": False,
                "logging_steps": 1,
                "save_steps": 0,
                "fast": given["fast"],
                # Rows of a picture meet in a step, in the order that every arm gets.
                "train_sampling_strategy": "group_by_media" if given.get("grouped") else "random",
            },
            "export": {"merge": False},
        }
    )


def run_mmft(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The stages of `mmft train` up to the end of training."""
    recipe, watch = recipe_of(given, folder), Watch()
    accelerator = make_accelerator(recipe.train)
    with open_run(recipe, resume=False, overwrite=True, rank=0, quiet=True) as run:
        backbone = load_backbone(recipe.model, recipe.quantization, device=accelerator.device)
        datasets = load_datasets(recipe, backbone.processor, run.journal)
        adapted = build_adapters(backbone, recipe.adapter, seed=recipe.train.seed)
        train_stage(run, adapted, datasets, accelerator, resume=False, extra=[watch])
    return watch.figures(given["batch"], given.get("epochs", 1.0))


def run_transformers(given: dict[str, Any], folder: Path, *, trl: bool) -> dict[str, Any]:
    """transformers' Trainer (or TRL's SFTTrainer) with peft: bf16, sdpa, no checkpointing, fused AdamW."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    recipe, watch = recipe_of({**given, "fast": False}, folder), Watch()
    accelerator = make_accelerator(recipe.train)
    with open_run(recipe, resume=False, overwrite=True, rank=0, quiet=True) as run:
        backbone = load_backbone(recipe.model, recipe.quantization, device=accelerator.device)
        datasets = load_datasets(recipe, backbone.processor, run.journal)
    adapted = build_adapters(backbone, recipe.adapter, seed=recipe.train.seed)
    plan, total = plan_steps(recipe, datasets.train, 1)
    order = [plan.at(position)[0] for position in range(total * plan.rows_per_step)]

    def collate(rows: Sequence[dict[str, int]]) -> dict[str, torch.Tensor]:
        chosen = [(datasets.train[row["index"]], 0) for row in rows]
        batch = assemble(datasets.renderer, chosen, pad_token_id=backbone.pad_token_id)
        watch.tokens += batch.tokens
        inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.inputs.items()}
        return {**inputs, "labels": batch.labels}

    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                watch.losses.append(float(logs["loss"]))

    shared: dict[str, Any] = {
        "use_cpu": True,
        "bf16": True,
        "per_device_train_batch_size": given["batch"],
        "max_steps": total,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": recipe.train.max_grad_norm,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    rows = [{"index": index} for index in order]
    options: dict[str, Any] = {"train_dataset": rows, "data_collator": collate, "callbacks": [Ends()]}
    with tempfile.TemporaryDirectory() as out:
        if trl:
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            arguments = SFTConfig(out, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **shared)
            options["train_dataset"] = Dataset.from_list(rows)
            SFTTrainer(adapted.model, arguments, processing_class=backbone.processor, **options).train()
        else:
            Trainer(adapted.model, TrainingArguments(out, **shared), **options).train()
    return watch.figures(given["batch"])


def main() -> None:
    """`given` is the arm as JSON: arm, model, rows, batch, steps, fast."""
    given = json.loads(sys.argv[1])
    quiet_upstream()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    with tempfile.TemporaryDirectory(prefix="mmft-bench-") as name:
        if given["arm"] == "mmft":
            found = run_mmft(given, Path(name))
        else:
            found = run_transformers(given, Path(name), trl=given["arm"] == "trl")
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
