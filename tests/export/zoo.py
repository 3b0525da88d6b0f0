"""Tiny random models of every family the merge must know, and peft adapters on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

TEXT = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
CONFIGS = {
    "llava": ("LlavaConfig", {"text_config": {"model_type": "llama", **TEXT}, "image_token_id": 150}),
    "llava_next": (
        "LlavaNextConfig",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "image_token_id": 150,
            "image_grid_pinpoints": [[28, 28]],
        },
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {"text_config": {**TEXT, "rope_parameters": ROPE}, "vision_config": QWEN, "image_token_id": 150},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 150,
        },
    ),
    "smolvlm": ("SmolVLMConfig", {"text_config": {"model_type": "llama", **TEXT}, "image_token_id": 150}),
    "idefics3": ("Idefics3Config", {"text_config": {"model_type": "llama", **TEXT}, "image_token_id": 150}),
    "mllama": (
        "MllamaConfig",
        {
            "text_config": {
                **TEXT,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "vision_output_dim": 48,
                "intermediate_layers_indices": [1],
                "supported_aspect_ratios": [[1, 1]],
                "max_num_tiles": 1,
            },
            "image_token_index": 150,
        },
    ),
    "paligemma": (
        "PaliGemmaConfig",
        {
            "text_config": {"model_type": "gemma", "head_dim": 8, **TEXT},
            "vision_config": {"model_type": "siglip_vision_model", **CLIP},
            "projection_dim": 32,
            "image_token_id": 150,
        },
    ),
    "internvl": (
        "InternVLConfig",
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {**CLIP, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": 150,
        },
    ),
    "fast_vlm": (
        "FastVlmConfig",
        {
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": "tf_efficientnet_lite0",
                "do_pooling": False,
                "hidden_size": 1280,
            },
            "image_token_id": 150,
        },
    ),
}
for _kind in ("llava", "llava_next"):
    CONFIGS[_kind][1]["vision_config"] = {"model_type": "clip_vision_model", **CLIP}
for _kind in ("smolvlm", "idefics3"):
    CONFIGS[_kind][1]["vision_config"] = {
        **CLIP,
        "model_type": CONFIGS[_kind][0].removesuffix("Config").lower() + "_vision",
    }
    CONFIGS[_kind][1]["scale_factor"] = 2

LAYERS = r"layers\.(\d+)\.(self_attn|cross_attn)\.(q_proj|v_proj|o_proj)$|layers\.\d+\.mlp\.down_proj$"


def tiny(
    kind: str, *, dtype: torch.dtype = torch.float32, tie: bool = False, seed: int = 0, **text: int
) -> PreTrainedModel:
    """A random model of a family; every parameter random, norms and biases too."""
    name, values = CONFIGS[kind]
    values = json.loads(json.dumps({**values, "tie_word_embeddings": tie}))
    values["text_config"] |= text
    config = getattr(transformers, name)(**values)
    if hasattr(config, "text_config"):
        config.text_config.tie_word_embeddings = tie
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def save_tiny(folder: Path, kind: str, **options: object) -> Path:
    """`tiny`, saved by save_pretrained."""
    shard = options.pop("max_shard_size", None)
    tiny(kind, **options).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))  # type: ignore[arg-type]
    return folder


def load(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The folder's model as transformers loads it."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or "auto").eval()


def adapt(base: Path, folder: Path, *, seed: int = 1, **options: object) -> Path:
    """A peft adapter with random (not zero) factors on the folder's model, saved by peft."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": linears(load(base)), **options}
    model = get_peft_model(load(base), LoraConfig(**values))  # type: ignore[arg-type]
    randomize(model, seed)
    model.save_pretrained(folder)
    return folder


def linears(model: nn.Module, *, every: int = 3) -> list[str]:
    """Full names of every third linear layer (heads aside), so that some tensors stay untouched."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]
    return names[::every]


def randomize(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
            elif "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)


def merged_by_peft(base: Path, adapter: Path, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Runtime state dict after peft's own merge."""
    return dict(PeftModel.from_pretrained(load(base, dtype), str(adapter)).merge_and_unload().state_dict())


def text_rows(model: PreTrainedModel, count: int = 3, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Text-only rows (the towers' merge is compared tensor by tensor)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 140, (count, 1, length), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
