"""ms-swift and LLaMA-Factory on the rows of `make bench`, each by the Python that it is installed for.

Their pins forbid them mmft's own environment, so `bench.py --peer swift=PYTHON --peer llamafactory=PYTHON` names one
of each; this file is run by it and imports nothing of mmft there. Both get the same folder, rows in the same order,
LoRA, learning rate and batch, and a template, registered as their documentation says, that makes the same tokens as
the model's own. Tuned for a CPU: sdpa, no checkpointing, fused AdamW, frozen tower and projector, dropout 0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.watch import Watch

PEERS: dict[str, dict[str, Any]] = {
    "swift": {"arm": "swift"},
    "llamafactory": {"arm": "llamafactory"},
    "llamafactory-packed": {"arm": "llamafactory", "packed": True},
}
"""Name of an arm -> what its process is told."""
USER, ASSISTANT, END, IMAGE = "<user>", "<assistant>", "<end>", "<image>"
"""Of the chat template of the bench's models."""


def installed(given: list[str]) -> dict[str, dict[str, Any]]:
    """Arms of the peers that can be run; `given` is NAME=PYTHON of each."""
    pythons = dict(one.partition("=")[::2] for one in given)
    unknown = sorted(set(pythons) - {told["arm"] for told in PEERS.values()})
    if unknown:
        raise SystemExit(f"no peer named {', '.join(unknown)}; there are swift and llamafactory")
    there = {name for name, python in pythons.items() if _importable(python, name)}
    return {
        arm: {**told, "python": pythons[told["arm"]], "fast": False}
        for arm, told in PEERS.items()
        if told["arm"] in there
    }


def _importable(python: str, module: str) -> bool:
    look = f"import importlib.util as u; raise SystemExit(u.find_spec({module!r}) is None)"
    try:
        return subprocess.run([python, "-c", look], cwd="/", capture_output=True).returncode == 0
    except OSError:
        return False


def prepare(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a peer's process is told: its rows are written in the order, and the adapter as it starts, of every arm."""
    from mmft.adapters.build import build_adapters
    from mmft.backbones.load import load_backbone
    from mmft.data.lengths import lengths_of
    from mmft.data.steps import plan_steps
    from mmft.runfolder import open_run
    from mmft.stages import load_datasets
    from tests.bench.arms import recipe_of

    recipe = recipe_of(told, folder / "runs")
    with open_run(recipe, resume=False, overwrite=True, rank=0, quiet=True) as run:
        backbone = load_backbone(recipe.model, recipe.quantization)
        datasets = load_datasets(recipe, backbone.processor, run.journal)
    build_adapters(backbone, recipe.adapter, seed=recipe.train.seed).model.save_pretrained(folder / "peer-adapter")
    plan, total = plan_steps(recipe, datasets.train, 1)
    source = Path(told["rows"])
    by_id = {row["id"]: row for row in map(json.loads, source.read_text(encoding="utf-8").splitlines())}
    order = [by_id[datasets.train[plan.at(at)[0]].id] for at in range(total * plan.rows_per_step)]
    rows = folder / "peer-rows.jsonl"
    rows.write_text("".join(json.dumps(_plain(row, source.parent)) + "\n" for row in order), encoding="utf-8")
    return {
        **told,
        "rows": str(rows),
        "longest": max(lengths_of(datasets.renderer, datasets.train)),
        "adapter": str(folder / "peer-adapter"),
        "train": {
            "per_device_train_batch_size": told["batch"],
            "gradient_accumulation_steps": 1,
            "max_steps": total,
            "learning_rate": recipe.train.learning_rate,
            "max_grad_norm": recipe.train.max_grad_norm,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
            "optim": "adamw_torch_fused",
            "bf16": True,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_num_workers": 0,
        },
    }


def _plain(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row as both peers read it: a picture is `<image>` in the text."""
    messages = []
    for one in row["messages"]:
        parts = one["content"] if isinstance(one["content"], list) else [{"type": "text", "text": one["content"]}]
        text = "".join(IMAGE if part["type"] == "image" else part["text"] for part in parts)
        messages.append({"role": one["role"], "content": text})
    return {"messages": messages, "images": [str((folder / name).resolve()) for name in row["images"]]}


class Seen:
    """Counts what a peer's model is given, before every forward."""

    def __init__(self) -> None:
        self.watch, self.rows = Watch(), 0

    def look(self, model: Any, args: Any, inputs: dict[str, Any]) -> None:
        """A forward's rows, of one picture each, and tokens."""
        self.rows += len(inputs["pixel_values"])
        self.watch.tokens += int((inputs["input_ids"] != model.config.get_text_config().pad_token_id).sum())

    def figures(self) -> dict[str, Any]:
        """The arm's line; a step's rows are counted, since a packed one has as many as fit."""
        return self.watch.figures(self.rows / len(self.watch.ends))


def callback(seen: Seen) -> Any:
    """transformers' callback that both peers take."""
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.register_forward_pre_hook(seen.look, with_kwargs=True)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.watch.ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                seen.watch.losses.append(float(logs["loss"]))

    return Ends()


def run_swift(told: dict[str, Any], seen: Seen) -> None:
    """`swift sft` by its Python entry; sdpa allows it neither packing nor padding-free batches."""
    from swift import callbacks_map, sft_main
    from swift.template import TemplateMeta, register_template
    from swift.template.templates.llava import LlavaHfTemplate

    class Bench(LlavaHfTemplate):
        def replace_tag(self, media_type: Any, index: int, inputs: Any) -> list[Any]:
            return [IMAGE]

    prompt = [f"{USER}{{{{QUERY}}}}{ASSISTANT}"]
    meta = TemplateMeta("bench", [["bos_token_id"]], prompt, chat_sep=[], suffix=[END], template_cls=Bench)
    register_template(meta)
    callbacks_map["bench"] = lambda args, trainer: callback(seen)
    options = {
        **told["train"],
        "model": told["model"],
        "model_type": "llava1_5_hf",
        "template": "bench",
        "use_hf": True,
        "dataset": told["rows"],
        "split_dataset_ratio": 0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "max_length": 4096,
        "output_dir": told["out"],
        "tuner_type": "lora",
        "adapters": told["adapter"],
        "freeze_vit": True,
        "freeze_aligner": True,
        "torch_dtype": "bfloat16",
        "attn_impl": "sdpa",
        "device_map": "cpu",
        "gradient_checkpointing": False,
        "vit_gradient_checkpointing": False,
        "callbacks": "bench",
    }
    sft_main([word for key, value in options.items() for word in (f"--{key}", str(value))])


def run_llamafactory(told: dict[str, Any], seen: Seen) -> None:
    """`llamafactory-cli train` by its Python entry; packed: as many rows in one as a batch holds."""
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.template import register_template
    from llamafactory.train.tuner import run_exp

    register_template(
        name="bench",
        format_user=StringFormatter(slots=[f"{USER}{{{{content}}}}{ASSISTANT}"]),
        format_assistant=StringFormatter(slots=[f"{{{{content}}}}{END}"]),
        format_prefix=EmptyFormatter(slots=[{"bos_token"}]),
        mm_plugin=get_mm_plugin(name="llava", image_token=IMAGE),
    )
    rows = Path(told["rows"])
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    layout = {"file_name": rows.name, "formatting": "sharegpt", "columns": columns, "tags": tags}
    (rows.parent / "dataset_info.json").write_text(json.dumps({"bench": layout}))
    packed = bool(told.get("packed"))
    # A packed row is as long as the cut-off, one position of it padding; its ids alone are padded to eighths.
    room = -(-(told["longest"] * told["batch"] + 1) // 8) * 8
    options = {
        **told["train"],
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": told["model"],
        "template": "bench",
        "dataset": "bench",
        "dataset_dir": str(rows.parent),
        "cutoff_len": room if packed else 4096,
        "disable_shuffling": True,
        "output_dir": told["out"],
        "finetuning_type": "lora",
        "adapter_name_or_path": told["adapter"],
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": True,
        "neat_packing": packed,
    }
    if packed:
        options["per_device_train_batch_size"] = 1
    run_exp(options, [callback(seen)])


def main() -> None:
    """`told` is the arm as JSON, made by `prepare`."""
    told = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="mmft-peer-") as name:
        os.environ |= {"HF_HOME": name, "HF_HUB_OFFLINE": "1", "MODELSCOPE_CACHE": name, "CUDA_VISIBLE_DEVICES": ""}
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        seen = Seen()
        told["out"] = f"{name}/out"
        (run_swift if told["arm"] == "swift" else run_llamafactory)(told, seen)
        sys.stdout.write("\n" + json.dumps({**seen.figures(), "reordered": bool(told.get("packed"))}) + "\n")


if __name__ == "__main__":
    main()
