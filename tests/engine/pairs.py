"""`python -m tests.engine.pairs OUT`: runs by one process and by two over gloo, with what each step computed.

Every run is a process forked from a warm parent (as the faults are tried). Rank 0 writes the gradients of every step as
they enter the update; every rank writes which of its forwards showed a picture. AdamW's epsilon is large here: at its
usual size a gradient of rounding noise moves its weight by the full rate, and the steps behind could not be compared.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.faults.ranks import two
from tests.faults.trial import at_step, expect, finish, train, wait

STEPS = 6
ROWS = 21
"""Not divisible by any of the steps below: each of them meets the border between two epochs."""
WORDS = ("Which colour?", "What colour has it, in one word?", "Tell me the colour of this picture, please.")
BASE: dict[str, Any] = {"per_device_train_batch_size": 2, "effective_batch_size": 4}
CASES: dict[str, dict[str, Any]] = {
    "one forward a rank": {"train": BASE},
    "accumulation": {"train": BASE | {"effective_batch_size": 12}, "adapter": {"lora_dropout": 0.1}},
    "ranks without a picture": {"train": BASE | {"per_device_train_batch_size": 1, "effective_batch_size": 2}},
    "packed": {"train": BASE | {"effective_batch_size": 16, "packing": True}},
    "augmented": {"train": BASE, "data": {"augmentation": {"crop": 0.3, "horizontal_flip": 0.5}}},
    "projector alone": {
        "train": BASE | {"per_device_train_batch_size": 1, "effective_batch_size": 2},
        "adapter": {"targets": ["projector"]},
    },
}
"""Each recipe's changes by section. Of a projector alone a row without a picture has no gradient."""
HELD = {"per_device_eval_batch_size": 2, "models": ["adapter"], "max_new_tokens": 2, "bootstrap_samples": 10}
SHARDED: dict[str, dict[str, Any]] = {
    "cut up": {"train": BASE | {"eval_steps": 3}, "evaluate": HELD},
    "cut up, DoRA, recomputed": {
        "train": BASE | {"effective_batch_size": 12, "gradient_checkpointing": True},
        "adapter": {"lora_dropout": 0.1, "use_dora": True, "targets": ["language.attention", "language.mlp"]},
    },
    "cut up, ranks without a picture": CASES["ranks without a picture"],
    "cut up, packed": CASES["packed"],
    "cut up, projector alone": CASES["projector alone"],
    "cut up, last layer and projector": {
        "model": {"name_or_path": "deep"},
        "train": CASES["projector alone"]["train"] | {"fast": False},
        "adapter": {"targets": ["language.attention", "projector"], "layers": "last:1"},
    },
}
"""The same with the language layers cut up over two ranks, against one process that holds them whole. Below the last
layer of four the backward pass of a row without a picture has nothing to compute, and yet three layers to gather (the
fast path would round otherwise on whole layers, and their four add up)."""
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}
WAYS = {"two": FSDP} | ({"zero": ZERO} if importlib.util.find_spec("deepspeed") else {})
"""Who cuts up, by the name of the runs' folder."""


def shelf(out: Path) -> None:
    """A tiny model and rows of three questions, every third of them without a picture."""
    from tests import tiny
    from tests.tiny import save_tiny_vlm, tiny_rows

    save_tiny_vlm(out / "model")
    with patch.dict(tiny._LLAMA, num_hidden_layers=4):
        save_tiny_vlm(out / "deep")
    settings = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_param_persistence_threshold": 0}
    (out / "zero.json").write_text(json.dumps({"zero_optimization": settings}))
    path = tiny_rows(out / "rows", ROWS)
    lines = []
    for number, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        asked = [{"type": "image"}, {"type": "text", "text": WORDS[number % 3]}]
        if number % 3 == 0:
            asked = [{"type": "text", "text": f"Name colour {number}."}]
            row = {key: value for key, value in row.items() if key not in ("image", "images")}
        row["messages"][0]["content"] = asked
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")


def recipe(out: Path, case: str) -> dict[str, Any]:
    """The values of a case."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": "model", "dtype": "float32"},
        "adapter": {"targets": ["language.attention", "projector"], "lora_rank": 4, "lora_dropout": 0.0},
        "data": {"train": [{"path": str(out / "rows" / "rows.jsonl")}], "max_length": 256},
        "train": {
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "adam_epsilon": 1e-2,
            "weight_decay": 0.1,
            "bf16": False,
            "logging_steps": 1,
            "packing": False,
        },
        "export": {"merge": False},
    }
    for section, changes in (CASES | SHARDED)[case].items():
        values[section] = values.get(section, {}) | changes
    values["model"]["name_or_path"] = str(out / values["model"]["name_or_path"])
    if "evaluate" in values:  # three rows: the second rank has a batch less than the first
        values["data"]["eval"] = [{"path": str(out / "rows" / "rows.jsonl#3"), "name": "held"}]
        values["export"] = {"merge": True, "verify_rows": 2}
    return values


def watched(place: Path) -> Any:
    """A `prepare` after which the run's gradients, and what its forwards show, are written to `place`."""

    def prepare() -> None:
        from safetensors.torch import save_file

        from mmft.engine.loop import Engine
        from mmft.engine.ranks import Ranks

        story = importlib.import_module("mmft.run")
        restore = story.restore_trained

        def restored(*given: Any, **named: Any) -> Any:
            (place / "restored").touch()
            return restore(*given, **named)

        summed, backward = Ranks.sum_gradients, Engine._backward
        seen: list[list[bool]] = []

        def sum_gradients(self: Any, params: Any) -> None:
            summed(self, params)
            if self.rank == 0:
                found = {name: one.grad.contiguous() for name, one in params.items() if one.grad is not None}
                save_file(found, place / f"step-{len(seen)}.safetensors")

        def note(self: Any, micros: Any, *more: Any) -> Any:
            seen.append(["pixel_values" in batch.inputs for batch in micros])
            (place / f"shown-{self.ranks.rank}.json").write_text(json.dumps(seen))
            sums = backward(self, micros, *more)
            held = [one.numel() for one in self.job.adapted.model.parameters() if hasattr(one, "ds_tensor")]
            (place / f"held-{self.ranks.rank}.json").write_text(json.dumps(held))
            return sums

        Ranks.sum_gradients, Engine._backward = sum_gradients, note  # type: ignore[method-assign]
        story.restore_trained = restored  # type: ignore[attr-defined]

    return prepare


def _cutting(out: Path, way: str) -> dict[str, str]:
    """What the launcher would set for a run whose layers are cut up."""
    return WAYS[way] | ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(out / "zero.json")} if way == "zero" else {})


def resumed(out: Path, way: str) -> None:
    """The run that is cut up, told to stop after three steps: once resumed as it was, once by one process alone."""
    values = recipe(out, "cut up")
    values["train"]["fast"] = False  # a run on whole layers would switch more of it on, and resume shares it
    stop = at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    more = _cutting(out, way)
    for name in ("uninterrupted", "again", "alone"):
        place = out / f"stopped {way}" / name
        place.mkdir(parents=True)
        if name != "uninterrupted":
            codes = [wait(pid) for pid in two(values, place, prepare=stop, environment=more)]
            expect(codes == [143, 143], f"{name}: {codes} {(place / 'log0').read_text()[-1500:]}")
        if name == "alone":
            codes = [finish(train(values, place, resume=True), place / "log0")]
        else:
            codes = [wait(pid) for pid in two(values, place, resume=name == "again", environment=more)]
        expect(not any(codes), f"{name}: {codes} {(place / 'log0').read_text()[-1500:]}")


def main() -> None:
    """All runs, into OUT/CASE/one, OUT/CASE/two and of those that are cut up by DeepSpeed OUT/CASE/zero."""
    from tests.faults.__main__ import warm

    out = Path(sys.argv[1])
    warm()
    expect(finish(lambda: shelf(out), out / "log") == 0, (out / "log").read_text() if (out / "log").exists() else "")
    for way in WAYS:
        resumed(out, way)
    for case in (*CASES, *SHARDED):
        values = recipe(out, case)
        for world in ("one", *WAYS) if case in SHARDED else ("one", "two"):
            place = out / case / world
            place.mkdir(parents=True)
            if world == "one":
                codes = [finish(train(values, place, prepare=watched(place)), place / "log0")]
            else:
                more = _cutting(out, world) if case in SHARDED else None
                codes = [wait(pid) for pid in two(values, place, prepare=watched(place), environment=more)]
            expect(not any(codes), f"{case} by {world}: {codes} {(place / 'log0').read_text()[-1500:]}")


if __name__ == "__main__":
    main()
