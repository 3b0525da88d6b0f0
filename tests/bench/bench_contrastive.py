"""`make bench-contrastive`: pairs of a picture and a text with a locked picture tower, alternating, fresh processes.

    python -m tests.bench.bench_contrastive --rounds 3 --pairs 256 --epochs 3

Model: CLIP ViT-B/32's exact shapes with random weights (open_clip's for its arms, transformers' for the others), CLIP's
own byte pairs, captions of 6 to 14 words, batch 64, bf16. Arms:

    clip        a plain loop of transformers' CLIP with peft: LoRA on the text tower, texts padded to the longest,
                CLIP's own loss, fused AdamW; the picture tower is frozen and runs in every epoch
    open_clip   as it ships: `lock_image_tower`, the text tower trained whole at 77 tokens (it has no LoRA), amp_bf16
    mmft        the same LoRA, every tower computed in every epoch
    mmft cache  `objective.cache_features`: the locked tower says each picture once
    mmft later  the same with what an earlier run kept on disk

Printed: samples/s after the first step, of the first epoch and of later ones, peak anonymous memory, ratio to `clip`
with its range over the rounds, and by how much the first step's loss differs from `clip`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.bench.watch import Watch

ROOT = Path(__file__).resolve().parents[2]
BATCH = 64
KEPT = ("mmft cache", "mmft later")
WORDS = (
    "red",
    "blue",
    "green",
    "small",
    "large",
    "round",
    "old",
    "dog",
    "cat",
    "car",
    "tree",
    "house",
    "man",
    "of",
    "near",
)


def save_clip(folder: Path) -> Path:
    """CLIP ViT-B/32 by its config in bf16, and a processor with CLIP's own vocabulary."""
    import transformers
    from open_clip.tokenizer import SimpleTokenizer

    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        theirs = SimpleTokenizer()
        merges = [tuple(pair) for pair in sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)]
        first, last = list(theirs.encoder)[-2:]
        special = {"bos_token": first, "eos_token": last, "unk_token": last, "pad_token": last}
        words = {"vocab": dict(theirs.encoder), "merges": merges, "model_max_length": 77}
        tokenizer = transformers.CLIPTokenizer(**words, **special)
        text = "a photo of two small dogs near the street"
        assert tokenizer(text)["input_ids"] == [int(one) for one in theirs(text)[0] if int(one)]
        model = transformers.CLIPModel(transformers.CLIPConfig()).to(torch.bfloat16)
        model.save_pretrained(folder)
        pictures = transformers.CLIPImageProcessor()
        transformers.CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_pairs(folder: Path, count: int) -> Path:
    """`count` JPEGs of 256 pixels with a caption each."""
    from PIL import Image

    path = folder / "rows.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    source, lines = random.Random(0), []
    for number in range(count):
        coarse = Image.frombytes("RGB", (16, 16), source.randbytes(768))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
        caption = " ".join(source.choices(WORDS, k=source.randint(6, 14)))
        lines.append(json.dumps({"id": str(number), "image": f"{number}.jpg", "caption": caption}))
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_of(given: dict[str, Any], folder: Path) -> Any:
    """What mmft and the plain loop share."""
    from mmft.recipe.load import load_recipe

    return load_recipe(
        {
            "name": "bench",
            "model": {"name_or_path": given["model"], "dtype": "bfloat16"},
            "adapter": {"targets": ["language.attention", "language.mlp"], "lora_rank": 16, "lora_alpha": 32},
            "data": {"train": given["rows"]},
            "objective": {"name": "contrastive", "cache_features": given["arm"] in KEPT},
            "train": {
                "output_dir": str(folder),
                "per_device_train_batch_size": BATCH,
                "gradient_accumulation_steps": 1,
                "max_steps": given["steps"],
                "learning_rate": 2e-4,
                "lr_scheduler_type": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
                "bf16": True,
                "logging_steps": 1,
                "save_steps": 0,
            },
            "export": {"merge": False},
        }
    )


def run_mmft(given: dict[str, Any], folder: Path, watch: Watch, *, loop: bool) -> None:
    """The stages of `mmft train`, or with `loop` a plain loop over the same rows, model and adapters."""
    from mmft.adapters.build import build_adapters
    from mmft.backbones.load import load_backbone
    from mmft.kinds import kind_of
    from mmft.runfolder import open_run
    from mmft.stages import load_datasets, make_accelerator, plan_steps, train_stage

    recipe = recipe_of(given, folder)
    kind, accelerator = kind_of(recipe), make_accelerator(recipe.train)
    with open_run(recipe, resume=False, overwrite=True, rank=0, quiet=True) as run:
        backbone = load_backbone(recipe.model, recipe.quantization, device=accelerator.device)
        datasets = load_datasets(recipe, backbone.processor, run.journal)
        adapted = kind.adapt(build_adapters(backbone, recipe.adapter, seed=recipe.train.seed), recipe)
        if not loop:
            train_stage(run, adapted, datasets, accelerator, resume=False, extra=[watch])
            return
    plan, total = plan_steps(recipe, datasets.train, 1)
    optimizer = torch.optim.AdamW(adapted.trainable().values(), lr=2e-4, weight_decay=0.0, fused=True)
    names = ("input_ids", "attention_mask", "pixel_values")
    for step in range(total):
        batch = datasets.renderer.assemble([(datasets.train[row], 0) for row, _ in plan.step_rows(step)])
        inputs = {name: batch.inputs[name] for name in names}
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = adapted.model(**inputs, return_loss=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.trainable().values(), recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(float(loss.detach()))
        watch.ends.append(time.perf_counter())


def run_open_clip(given: dict[str, Any], watch: Watch) -> None:
    """open_clip's own model, transform, tokenizer and loss, as its training loop uses them with --lock-image."""
    import open_clip
    from PIL import Image

    torch.manual_seed(0)
    model, transform, _ = open_clip.create_model_and_transforms("ViT-B-32")
    model.lock_image_tower()
    model.train()
    tokenizer, loss_of = open_clip.get_tokenizer("ViT-B-32"), open_clip.ClipLoss()
    rows = [json.loads(line) for line in Path(given["rows"]).read_text().splitlines()]
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0, fused=True)
    for step in range(given["steps"]):
        chosen = [rows[(step * BATCH + number) % len(rows)] for number in range(BATCH)]
        images = [Image.open(Path(given["rows"]).parent / row["image"]).convert("RGB") for row in chosen]
        pixels, words = torch.stack([transform(one) for one in images]), tokenizer([row["caption"] for row in chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(pixels, words)
            loss = loss_of(*out[:3])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(float(loss.detach()))
        watch.ends.append(time.perf_counter())


def figures(watch: Watch, given: dict[str, Any]) -> dict[str, Any]:
    """The arm's line."""
    epoch = given["pairs"] // BATCH
    peak = watch.figures(BATCH)["peak"]
    first = BATCH * (epoch - 1) / (watch.ends[epoch - 1] - watch.ends[0])
    later = BATCH * (len(watch.ends) - epoch) / (watch.ends[-1] - watch.ends[epoch - 1])
    whole = BATCH * (len(watch.ends) - 1) / (watch.ends[-1] - watch.ends[0])
    return {"whole": whole, "first": first, "later": later, "peak": peak, "losses": watch.losses}


def main() -> None:
    """The table; with `--arm` one arm, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if not given")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        told, watch = json.loads(given.arm), Watch()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        with tempfile.TemporaryDirectory() as name:
            if told["arm"] == "open_clip":
                run_open_clip(told, watch)
            else:
                run_mmft(told, Path(name), watch, loop=told["arm"] == "clip")
        sys.stdout.write("\n" + json.dumps(figures(watch, told)) + "\n")
        return
    with tempfile.TemporaryDirectory(prefix="mmft-contrastive-") as name:
        table(given, given.folder or Path(name))


def table(given: argparse.Namespace, folder: Path) -> None:
    """Run every arm in every round and print their medians."""
    rows = save_pairs(folder / f"pairs-{given.pairs}", given.pairs)
    told = {"model": str(save_clip(folder / "clip")), "rows": str(rows), "pairs": given.pairs}
    told["steps"] = given.pairs * given.epochs // BATCH
    arms = ["clip", "open_clip", "mmft", *KEPT]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(given.rounds):
        for arm in arms if turn % 2 == 0 else reversed(arms):
            words = [sys.executable, "-m", "tests.bench.bench_contrastive", "--arm", json.dumps({**told, "arm": arm})]
            cache = folder / "cache" / arm
            if arm != "mmft later":
                shutil.rmtree(cache, ignore_errors=True)
            elif not cache.exists():
                subprocess.run(words, cwd=ROOT, capture_output=True, env={**os.environ, "MMFT_CACHE": str(cache)})
            environment = {**os.environ, "MMFT_CACHE": str(cache)}
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise SystemExit(f"{arm}\n{done.stderr[-3000:]}")
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
            sys.stderr.write(f"round {turn + 1} {arm}: {found[arm][-1]['whole']:.1f} samples/s\n")
    sys.stdout.write(
        f"{'arm':<12}{'samples/s':>10}{'1st epoch':>11}{'later':>9}{'peak GB':>9}{'x clip':>8}{'range':>14}"
    )
    sys.stdout.write(f"{'loss off':>10}\n")
    for arm, ours in found.items():
        middle = {name: statistics.median(one[name] for one in ours) for name in ("whole", "first", "later")}
        pairs = zip(ours, found["clip"], strict=True)
        ratios = sorted(one["whole"] / other["whole"] for one, other in pairs)
        off = abs(ours[0]["losses"][0] - found["clip"][0]["losses"][0])
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        shown = "" if arm == "open_clip" else f"{off:10.4f}"
        sys.stdout.write(f"{arm:<12}{middle['whole']:10.1f}{middle['first']:11.1f}{middle['later']:9.1f}")
        sys.stdout.write(f"{max(one['peak'] for one in ours) / 1e9:9.2f}{statistics.median(ratios):8.2f}")
        sys.stdout.write(f"{spread:>14}{shown}\n")


if __name__ == "__main__":
    main()
