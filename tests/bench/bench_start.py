"""`python -m tests.bench.bench_start`: seconds from a process's start to the end of its first training step, and rows a
second of the check of lengths.

Start: alternating fresh processes of plain transformers (import, `from_pretrained` of model and processor, peft, one
batch of the rows, forward, backward, AdamW) and of `mmft train`, which in this time also checks the recipe, every row's
length, the data's fingerprint, and proves its fast path on the model. Model: SmolLM-135M's width with a CLIP ViT-S/16
tower, or the shipped nano VLM. Rows: 20,000 short questions, four on a picture, lengths by `Renderer.sizes` one at a
time and by `row_lengths`, in one process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4

PLAIN = """
import json, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model, rows, batch = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
processor = AutoProcessor.from_pretrained(model)
base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.bfloat16)
config = LoraConfig(r=16, target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj")
model = get_peft_model(base, config)
lines = [json.loads(line) for line in rows.open()][:batch]
texts = [processor.apply_chat_template(line["messages"], tokenize=False) for line in lines]
pictures = [[Image.open(rows.parent / name).convert("RGB") for name in line["images"]] for line in lines]
inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-4, fused=True)
with torch.autocast("cpu", dtype=torch.bfloat16):
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
loss.backward()
optimizer.step()
print("first step", float(loss), flush=True)
"""


def timed(words: list[str], log: Path, over: Callable[[], bool]) -> tuple[float, float]:
    """(seconds, seconds of processor time) of a process until `over`; it is stopped then. It must not end before."""
    begin = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream, cwd=ROOT)
    while not over():
        if process.poll() is not None:
            raise SystemExit(log.read_text()[-3000:])
        time.sleep(0.005)
    seconds = time.perf_counter() - begin
    process.kill()
    used = os.wait4(process.pid, 0)[2]
    process.returncode = -9
    return seconds, used.ru_utime + used.ru_stime


def plain_seconds(model: Path, rows: Path, folder: Path) -> tuple[float, float]:
    """Of a process of plain transformers until it has said its first step."""
    log = folder / "plain.log"
    log.unlink(missing_ok=True)
    words = [sys.executable, "-c", PLAIN, str(model), str(rows), str(BATCH)]
    return timed(words, log, lambda: log.is_file() and b"first step" in log.read_bytes())


def mmft_seconds(model: Path, rows: Path, folder: Path) -> tuple[float, float]:
    """Of `mmft train` until its metrics hold a step."""
    recipe = {
        "name": "start",
        "model": {"name_or_path": str(model), "dtype": "bfloat16"},
        "adapter": {"targets": ["language.attention", "language.mlp"], "lora_rank": 16},
        "data": {"train": str(rows), "max_length": 4096},
        "train": {"output_dir": str(folder / "runs"), "max_steps": 1000, "logging_steps": 1, "save_steps": 0}
        | {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "bf16": True},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.rmtree(folder / "runs", ignore_errors=True)
    metrics = folder / "runs" / "start" / "metrics.jsonl"
    words = [sys.executable, "-m", "mmft", "train", str(folder / "recipe.yaml")]
    return timed(words, folder / "log", lambda: metrics.is_file() and metrics.stat().st_size > 0)


def start(kind: str, rounds: int, folder: Path) -> None:
    """Print both sides of the start."""
    from tests.bench.models import save_model, save_rows

    if kind == "nano":
        import mmft

        model = Path(mmft.__file__).parent / "assets" / "nano_vlm"
    else:
        model = save_model(folder / kind, kind)
    rows = save_rows(folder / f"{kind}-rows", "llava" if kind == "nano" else kind, "vqa", 64)
    os.environ |= {"MMFT_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    mmft_seconds(model, rows, folder)  # what a machine learns once: times of kernels, compiled files of Python
    found: dict[str, list[tuple[float, float]]] = {"plain transformers": [], "mmft train": []}
    for turn in range(rounds):
        for name in sorted(found, reverse=turn % 2 == 0):
            shutil.rmtree(folder / "cache" / "features", ignore_errors=True)
            ours = name == "mmft train"
            found[name].append(mmft_seconds(model, rows, folder) if ours else plain_seconds(model, rows, folder))
            sys.stderr.write(
                "round {} {}: {:.2f} s, {:.2f} s of processor time\n".format(turn + 1, name, *found[name][-1])
            )
    for at, what in enumerate(("to the end of the first step", "of processor time")):
        for name, seconds in found.items():
            sys.stdout.write(f"{kind:<8}{name:<20}{statistics.median(one[at] for one in seconds):6.2f} s {what}\n")
        pairs = zip(found["mmft train"], found["plain transformers"], strict=True)
        ratios = [ours[at] / theirs[at] for ours, theirs in pairs]
        low, high = min(ratios), max(ratios)
        sys.stdout.write(f"{kind:<8}ratio {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})\n")


def audit(count: int, folder: Path) -> None:
    """Print rows a second of every station that looks at all rows before training."""
    import numpy as np
    import torch

    from mmft.backbones.load import load_backbone
    from mmft.data.audit import fingerprint
    from mmft.data.formats import load_many
    from mmft.data.lengths import row_lengths
    from mmft.kinds import kind_of
    from mmft.recipe.load import load_recipe
    from tests.bench.models import save_rows

    torch.set_num_threads(1)
    path = save_rows(folder / f"audit-{count}", "llava", "four", count)
    recipe = load_recipe({"name": "audit", "model": "shipped:nano-vlm", "data": {"train": str(path)}})
    kind, backbone = kind_of(recipe), load_backbone(recipe.model)
    renderer = kind.renderer(recipe, backbone.processor)

    def rate(what: str, work, rows: int = count):
        begin, used = time.perf_counter(), time.process_time()
        done = work()
        spent, used = time.perf_counter() - begin, time.process_time() - used
        sys.stdout.write(f"{what:<44}{rows / spent:10,.0f} rows/s, {rows / used:10,.0f} a second of processor time\n")
        return done

    samples = rate("read", lambda: load_many(recipe.data.train, recipe.data, 0, wanted=kind.formats))[0].samples
    some = samples[: count // 10]
    alone = rate("lengths, one row at a time", lambda: [renderer.sizes(row) for row in some], len(some))
    found = rate("lengths", lambda: row_lengths(renderer, samples))
    rate("lengths, a second time (packing)", lambda: row_lengths(renderer, samples))
    rate("fingerprint", lambda: fingerprint(samples))
    again = kind.renderer(recipe, backbone.processor)
    rate("lengths and fingerprint", lambda: (row_lengths(again, samples), fingerprint(samples)))
    assert np.array_equal(found[: len(some)], np.array(alone))


def main() -> None:
    """Both, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llava", choices=["llava", "smolvlm", "qwen2_vl", "nano"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--only", choices=["start", "audit"])
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if not given")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mmft-start-") as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if given.only != "audit":
            start(given.model, given.rounds, folder)
        if given.only != "start":
            audit(given.rows, folder)


if __name__ == "__main__":
    main()
