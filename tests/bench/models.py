"""Models at real shapes with random weights, and seeded rows for them: what `make bench` trains on.

    llava       SmolLM-135M's width (12 layers, hidden 576, vocabulary 49,152) with a CLIP ViT-S/16 tower at 224 pixels
    smolvlm     SmolVLM-256M's exact shapes: 30 layers of 576, SigLIP-B/16 at 512 pixels, 64 tokens a picture
    qwen2_vl    a small Qwen2-VL with M-RoPE: 12 layers of 896, tower 12 layers of 512, 256 tokens a picture

Text is one token a byte; ids are those of a byte, so the vocabulary's size is the model's, not the text's.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers

from tests import tiny

PIXELS = {"llava": 224, "smolvlm": 512, "qwen2_vl": 448}
_LLAMA = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
_SMALL = {**_LLAMA, "num_key_value_heads": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_config(kind: str) -> Any:
    """The config, with the token ids of the tiny tokenizer of the kind."""
    tokens = {token: number for number, token in enumerate(tiny._specials(kind))}
    ids: dict[str, Any] = {"image_token_id": tokens[tiny.image_token(kind)], "tie_word_embeddings": True}
    if kind == "llava":
        text = {**_SMALL, "num_hidden_layers": 12, "vocab_size": 49152, "tie_word_embeddings": True}
        tower = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
        vision = {"model_type": "clip_vision_model", **tower, "image_size": 224, "patch_size": 16}
        return transformers.LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1, **ids)
    if kind == "smolvlm":
        text = {**_SMALL, "num_hidden_layers": 30, "vocab_size": 49280, "tie_word_embeddings": True}
        tower = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        vision = {"model_type": "smolvlm_vision", **tower, "image_size": 512, "patch_size": 16}
        return transformers.SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=4, **ids)
    text = {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 12, "num_attention_heads": 14}
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6}
    more = {"num_key_value_heads": 2, "vocab_size": 49152, "rope_parameters": rope, "tie_word_embeddings": True}
    special = {key: _SMALL[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    tower = {"depth": 12, "embed_dim": 512, "hidden_size": 896, "num_heads": 8, "patch_size": 14, "mlp_ratio": 4}
    ids["video_token_id"] = tokens["<|video_pad|>"]
    ids["vision_start_token_id"] = tokens["<|vision_start|>"]
    ids["vision_end_token_id"] = tokens["<|vision_end|>"]
    return transformers.Qwen2VLConfig(text_config={**text, **more, **special}, vision_config=tower, **ids)


def make_processor(kind: str) -> Any:
    """The family's processor at the model's real sizes."""
    side = PIXELS[kind]
    small = tiny.tiny_processor(kind)
    options: dict[str, Any] = {"tokenizer": small.tokenizer, "chat_template": small.chat_template}
    if kind == "llava":
        square = {"height": side, "width": side}
        pictures = transformers.CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)
        return transformers.LlavaProcessor(
            image_processor=pictures,
            patch_size=16,
            vision_feature_select_strategy="default",
            image_token=tiny.IMAGE,
            num_additional_image_tokens=1,
            **options,
        )
    if kind == "smolvlm":
        edge = {"longest_edge": side}
        pictures = transformers.Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
        return transformers.Idefics3Processor(pictures, image_seq_len=64, **options)
    sizes = {"patch_size": 14, "min_pixels": side * side, "max_pixels": side * side}
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
        **options,
    )


def save_model(folder: Path, kind: str) -> Path:
    """The model in bf16 and its processor, written once; weights are a function of nothing but the kind."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(make_config(kind), dtype=torch.bfloat16)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
        model.save_pretrained(folder)
        processor = make_processor(kind)
        processor.tokenizer.model_max_length = 100_000
        processor.save_pretrained(folder)
    return folder


LENGTHS = {
    "vqa": (26, 15, 0.0),
    "four": (26, 15, 0.0),
    "long": (40, 150, 0.6),
    "mixed": (30, 60, 1.0),
}
"""Bytes of the question, median bytes of the answer, spread of its logarithm. `four`: four questions a picture."""


def save_rows(folder: Path, kind: str, data: str, count: int) -> Path:
    """`folder/rows.jsonl` with `count` rows and their JPEGs (a picture each; with `four` a picture for four rows)."""
    from PIL import Image

    path = folder / "rows.jsonl"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    source, lines = random.Random(1), []
    asked, answered, spread = LENGTHS[data]
    size = (PIXELS[kind] * 5 // 4, PIXELS[kind])
    for number in range(count):
        picture = folder / f"{number // (4 if data == 'four' else 1)}.jpg"
        if not picture.exists():
            coarse = Image.frombytes("RGB", (16, 12), source.randbytes(16 * 12 * 3))
            coarse.resize(size, Image.Resampling.BICUBIC).save(picture, quality=90)
        question = "".join(source.choices("abcdefghij ", k=asked + source.randint(-4, 4)))
        length = min(600, max(3, int(answered * source.lognormvariate(0, spread)))) if spread else answered
        answer = "".join(source.choices("klmnopqrst ", k=length))
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": f"row-{number}", "messages": messages, "images": [picture.name]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def flops(kind: str, *, tokens: float, supervised: float, length: float, rank: int, towers: float) -> float:
    """Floating-point operations that one row's step cannot do without (2 for a multiply-add).

    Language model: forward and the backward to its inputs, `2 P T` each, attention `4 d T S / 2` and 2.5 times that
    backward, LoRA `6 r T (in + out)` over both, head `4 h V` for each supervised row; tower: forward only, `towers`
    times.
    """
    config = make_config(kind)
    text = config.get_text_config()
    wide, inner = text.hidden_size, text.intermediate_size
    width = wide // text.num_attention_heads
    keys = text.num_key_value_heads * width
    shapes = [(wide, wide), (wide, keys), (wide, keys), (wide, wide), (wide, inner), (wide, inner), (inner, wide)]
    weights, edges = sum(a * b for a, b in shapes), sum(a + b for a, b in shapes)
    layer = 4 * weights * tokens + 3.5 * 2 * tokens * length * wide + 6 * rank * tokens * edges
    head = 4 * wide * text.vocab_size * supervised
    vision = config.vision_config
    across = getattr(vision, "embed_dim", None) or vision.hidden_size
    deep = getattr(vision, "num_hidden_layers", None) or vision.depth
    up = getattr(vision, "intermediate_size", None) or 4 * across
    patches = (PIXELS[kind] // vision.patch_size) ** 2
    tower = deep * (2 * patches * (4 * across**2 + 2 * across * up) + 4 * patches**2 * across)
    return text.num_hidden_layers * layer + head + towers * tower
