"""Tiny random vision-language models that load like real ones: weights, processor, tokenizer and chat template.

`tiny_vlm` makes a model, `save_tiny_vlm` a whole folder for `AutoModelForImageTextToText` / `AutoProcessor`, and
`tiny_rows` a data set that such a model can learn: what colour is the picture?
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers

WORKING = ("llava", "smolvlm", "qwen2_vl", "mllama", "fast_vlm")
"""Kinds that come with a working processor."""
SIDE = 32
"""Pixels per side of the pictures of `tiny_rows`."""
PAD, BOS, END, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "<end>", "<image>", "<user>", "<assistant>"
_EXTRA = {
    "smolvlm": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "mllama": ["<|image|>", "<|python_tag|>"],
}
_IMAGE_TEXT = {"qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>", "mllama": "<|image|>"}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}

_TEXT = {
    "vocab_size": 288,
    "hidden_size": 64,  # multiples of 64, the block of 4-bit weights: other widths cannot be quantized on a CPU
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_CLIP = {"model_type": "clip_vision_model", **_TOWER}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER, "vision_use_head": False}
_LLAMA = {"model_type": "llama", **_TEXT}
_QWEN2 = {"model_type": "qwen2", **_TEXT}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("LlavaConfig", {"text_config": _LLAMA, "vision_config": _CLIP, "vision_feature_layer": -1}),
    "smolvlm": (
        "SmolVLMConfig",
        {"text_config": _LLAMA, "vision_config": {**_TOWER, "model_type": "smolvlm_vision"}, "scale_factor": 2},
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 24,
                "hidden_size": 64,
                "num_heads": 2,
                "patch_size": 8,
                "mlp_ratio": 2,
            },
        },
    ),
    "mllama": (
        "MllamaConfig",
        {
            "text_config": {
                **_TEXT,
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": SIDE,
                "patch_size": 8,
                "vision_output_dim": 48,
                "intermediate_layers_indices": [1],
                "supported_aspect_ratios": [[1, 1]],
                "max_num_tiles": 1,
            },
        },
    ),
    "fast_vlm": (
        "FastVlmConfig",
        {
            "text_config": _QWEN2,
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "test_efficientnet",
                "do_pooling": False,
                "hidden_size": 256,
                "model_args": {"in_chans": 3},
            },
        },
    ),
    "idefics3": (
        "Idefics3Config",
        {"text_config": _LLAMA, "vision_config": {**_TOWER, "model_type": "idefics3_vision"}, "scale_factor": 2},
    ),
    "paligemma": (
        "PaliGemmaConfig",
        {"text_config": {"model_type": "gemma", **_TEXT}, "vision_config": _SIGLIP, "projection_dim": 64},
    ),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": {**_TEXT, "sliding_window": 16},
            "vision_config": _SIGLIP,
            "mm_tokens_per_image": 4,
        },
    ),
    "internvl": (
        "InternVLConfig",
        {"text_config": _QWEN2, "vision_config": {**_TOWER, "image_size": [SIDE, SIDE], "patch_size": [8, 8]}},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {**_TEXT, "rope_parameters": _ROPE},
            "vision_config": {
                "depth": 2,
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_heads": 2,
                "out_hidden_size": 64,
                "patch_size": 8,
                "fullatt_block_indexes": [1],
            },
        },
    ),
}
KINDS = tuple(_CONFIGS)

_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<assistant>' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end>' }}{% endgeneration %}"
    "{% else %}{{ '<user>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE_HERE' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tiny_config(kind: str, *, tie: bool = False) -> Any:
    """Config of a kind, with the token ids of its tiny tokenizer."""
    name, values = _CONFIGS[kind]
    values = copy.deepcopy(values)
    tokens = {token: number for number, token in enumerate(_specials(kind))}
    key = "image_token_index" if kind == "mllama" else "image_token_id"
    values[key] = tokens[image_token(kind)]
    if kind == "qwen2_vl":
        values["video_token_id"] = tokens["<|video_pad|>"]
        values["vision_start_token_id"] = tokens["<|vision_start|>"]
        values["vision_end_token_id"] = tokens["<|vision_end|>"]
    values["text_config"]["tie_word_embeddings"] = tie
    return getattr(transformers, name)(**values, tie_word_embeddings=tie)


def tiny_vlm(kind: str = "llava", seed: int = 0, *, tie: bool = False) -> tuple[Any, Any]:
    """(model, config) in float32 and eval mode; every weight is random and a function of `seed` alone."""
    config = tiny_config(kind, tie=tie)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(torch.randn(value.shape, generator=source) * (0.3 / value[0].numel() ** 0.5 + 0.02))
            else:  # norms stay near one and biases near zero
                base = 1.0 if name.endswith("weight") else 0.0
                value.copy_(base + 0.1 * torch.randn(value.shape, generator=source))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model.eval(), config


def save_tiny_vlm(
    folder: Path, kind: str = "llava", *, seed: int = 0, tie: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """A complete model folder of a kind in `WORKING`; returns `folder`."""
    model, _ = tiny_vlm(kind, seed, tie=tie)
    model.to(dtype).save_pretrained(folder)
    tiny_processor(kind).save_pretrained(folder)
    return folder


def tiny_tokenizer(kind: str = "llava") -> Any:
    """One token per byte plus the special tokens: any text can be encoded and decoded without loss."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = _specials(kind)
    vocabulary = {
        token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        extra_special_tokens={"image_token": image_token(kind)},
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def tiny_processor(kind: str = "llava") -> Any:
    """The family's own processor for pictures of `SIDE` pixels (for smolvlm that of Idefics 3, which needs no
    num2words)."""
    tokenizer = tiny_tokenizer(kind)
    template = _TEMPLATE.replace("IMAGE_HERE", _IMAGE_TEXT.get(kind, IMAGE))
    square = {"height": SIDE, "width": SIDE}
    if kind in ("llava", "fast_vlm"):
        side = SIDE if kind == "llava" else 2 * SIDE  # the timm tower halves five times: 2 x 2 cells are left
        square = {"height": side, "width": side}
        pictures = transformers.CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)
        return transformers.LlavaProcessor(
            image_processor=pictures,
            tokenizer=tokenizer,
            patch_size=8 if kind == "llava" else 32,
            vision_feature_select_strategy="default" if kind == "llava" else "full",
            chat_template=template,
            image_token=IMAGE,
            num_additional_image_tokens=1 if kind == "llava" else 0,
        )
    if kind == "smolvlm":
        pictures = transformers.Idefics3ImageProcessor(
            size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
        )
        return transformers.Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)
    if kind == "qwen2_vl":
        sizes = {"patch_size": 8, "min_pixels": SIDE * SIDE, "max_pixels": SIDE * SIDE}
        return transformers.Qwen2VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(**sizes),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(**sizes),
            chat_template=template,
        )
    if kind == "mllama":
        pictures = transformers.MllamaImageProcessor(size=square, max_image_tiles=1)
        return transformers.MllamaProcessor(pictures, tokenizer, chat_template=template)
    raise ValueError(f"{kind} has no tiny processor")


def tiny_rows(folder: Path, n: int = 8, seed: int = 0) -> Path:
    """`folder/rows.jsonl` with `n` rows (messages, images) and its PNGs; the answer is the colour of the picture."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    lines = []
    for number in range(n):
        colour = names[(number * 7 + seed) % len(names)]
        path = folder / f"{seed}-{number}.png"
        shade = tuple(max(0, value - 3 * (number // len(names))) for value in COLOURS[colour])
        Image.new("RGB", (SIDE, SIDE), shade).save(path)
        question = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"id": f"row-{number}", "messages": messages, "images": [path.name]}))
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


def tiny_inputs(kind: str = "llava", *, answer: str | None = "red", batch: int = 1) -> dict[str, torch.Tensor]:
    """What the tiny processor makes of one picture and one question (and its answer), `batch` times."""
    from PIL import Image

    question = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    processor = tiny_processor(kind)
    text = processor.apply_chat_template(messages, add_generation_prompt=answer is None)
    pictures = [[Image.new("RGB", (SIDE, SIDE), list(COLOURS.values())[i % 4])] for i in range(batch)]
    return dict(processor(text=[text] * batch, images=pictures, return_tensors="pt", add_special_tokens=False))


def image_token(kind: str) -> str:
    """The placeholder that a kind's tokenizer has for one image token."""
    return {"qwen2_vl": "<|image_pad|>", "mllama": "<|image|>"}.get(kind, IMAGE)


def _specials(kind: str) -> list[str]:
    return [PAD, BOS, END, IMAGE, USER, ASSISTANT, *_EXTRA.get(kind, [])]
