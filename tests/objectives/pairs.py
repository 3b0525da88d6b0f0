"""Tiny dual encoders with processors, and pairs that they can learn: a picture of one colour and its name."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from tests.families.tiny import shrink
from tests.runs import workshop
from tests.tiny import SIDE, tiny_tokenizer

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
    "yellow": (230, 220, 30),
    "cyan": (20, 220, 220),
    "pink": (240, 120, 200),
}


def tiny_dual(kind: str = "dual") -> Path:
    """A model folder: `dual` (ViT and BERT), `clip` or `siglip`."""
    return _tiny_dual(kind)


@functools.cache
def _tiny_dual(kind: str) -> Path:
    folder = workshop() / f"dual-{kind}"
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 24
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "dual":
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
            shrink("vit"), shrink("bert"), projection_dim=48
        )
        cls, wrap = transformers.VisionTextDualEncoderModel, transformers.VisionTextDualEncoderProcessor
    elif kind == "clip":
        config, cls = shrink("clip", projection_dim=48, text_config=ids), transformers.CLIPModel
        wrap = transformers.CLIPProcessor
    else:
        config = shrink("siglip", text_config={"projection_size": 32, **ids})
        cls, wrap = transformers.SiglipModel, transformers.SiglipProcessor
        tokenizer.model_input_names = ["input_ids"]
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.08)
        if kind == "siglip":
            model.logit_scale.fill_(2.3)
            model.logit_bias.fill_(-2.0)
    model.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    pictures = transformers.CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)
    if kind == "siglip":
        pictures = transformers.SiglipImageProcessor(size=square)
    wrap(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@functools.cache
def pair_rows(n: int = 32, seed: int = 0) -> Path:
    """`n` rows (image, captions), shades of eight colours; each third one has a hard negative."""
    folder = workshop() / f"pairs-{n}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    names, lines = list(COLOURS), []
    for number in range(n):
        name = names[(number + seed) % len(names)]
        shade = tuple(max(0, min(255, value + 3 * (number // len(names) + seed))) for value in COLOURS[name])
        Image.new("RGB", (SIDE, SIDE), shade).save(folder / f"{number}.png")
        row: dict[str, Any] = {"id": f"pair-{number}", "image": f"{number}.png", "group": name}
        row["captions"] = [name, f"a {name} square"]
        if number % 3 == 0:
            row["negatives"] = [f"not {name}"]
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def values(folder: Path, changes: Mapping[str, Any] | None = None, *, kind: str = "dual") -> dict[str, Any]:
    """A contrastive recipe: 16 rows a step in two micro-batches, fp32; `changes` by dots."""
    recipe: dict[str, Any] = {
        "name": "pairs",
        "model": {"name_or_path": str(tiny_dual(kind)), "dtype": "float32"},
        "adapter": {
            "targets": ["language.attention", "language.mlp", "vision.attention", "vision.mlp"],
            "lora_rank": 16,
            "lora_dropout": 0.1,
        },
        "data": {"train": [{"path": str(pair_rows())}], "eval": [{"path": str(pair_rows(8, 1)), "name": "held"}]},
        "objective": {"name": "contrastive"},
        "train": {
            "output_dir": str(folder / "runs"),
            "per_device_train_batch_size": 8,
            "effective_batch_size": 16,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "bf16": False,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "evaluate": {"bootstrap_samples": 50, "per_device_eval_batch_size": 8},
        "export": {"verify_rows": 4},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return recipe
