"""The default config of any model type made small: sizes by role, one layer of each kind, tokens renumbered."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

VOCABULARY = 320
WIDTH = {"text": 64, "vision": 32, "audio": 32, "other": 48}
"""Hidden sizes by role: different ones, so that a mixed up width is a crash and not a coincidence."""
PATCH, SIDE = 8, 32
"""Pixels per side of a patch and of a picture: 4 x 4 patches, 2 x 2 after merging."""

_TEXT_KEYS = re.compile(r"text|decoder|language|llm|talker|thinker|predictor")
_VISION_KEYS = re.compile(r"vision|visual|image|vit|sam|vq")
_AUDIO_KEYS = re.compile(r"audio|speech|codec|tokenizer_encoder|asr|diarization|encoder_config")


def _words(names: str) -> tuple[str, ...]:
    return tuple(names.split())


_DEPTHS = _words(
    "num_hidden_layers depth n_layers num_layers layers encoder_layers decoder_layers num_decoder_layers"
    " conf_num_hidden_layers resampler_depth num_blocks num_transformer_layers"
)
_HEADS = _words(
    "num_attention_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads n_heads n_head"
    " conf_num_attention_heads resampler_n_heads resampler_heads swa_num_attention_heads num_sliding_attention_heads"
    " linear_num_heads index_n_heads linear_num_value_heads"
)
_KV_HEADS = _words(
    "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_global_key_value_heads"
    " num_attention_groups"
)
_HEAD_DIMS = _words(
    "head_dim global_head_dim swa_head_dim resampler_head_dim resampler_dim_head dim_head d_kv linear_key_head_dim"
    " linear_value_head_dim linear_head_dim qk_nope_head_dim v_head_dim index_head_dim mamba_head_dim"
)
_WIDTHS = _words(
    "hidden_size d_model n_embd hidden_dim embed_dim embedding_size word_embed_proj_dim patch_embed_hidden_size"
    " decoder_hidden_size moe_hidden_size audio_hidden_size pooler_output_size"
)
_FFN = _words(
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim n_inner intermediate_size_mlp"
    " dense_intermediate_size alignment_intermediate_size projection_intermediate_size projector_hidden_size"
    " projection_hidden_size projection_hidden_dim merged_hidden_size downsample_hidden_size"
)
_EXPERT_FFN = _words(
    "moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size share_expert_dim"
    " shared_experts_intermediate_size shared_intermediate_size"
)
_TO_TEXT = _words("out_hidden_size text_hidden_size output_dim adapter_out_dim projector_output_dim projection_dim")
_FIXED: dict[str, int] = {
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    **dict.fromkeys(("max_position_embeddings", "max_2d_position_embeddings", "max_source_positions"), 512),
    **dict.fromkeys(("num_query_tokens", "latent_query_num", "resampler_n_latents", "resampler_num_latents"), 4),
    **dict.fromkeys(("mm_tokens_per_image", "num_image_tokens", "image_seq_length", "vision_soft_tokens_per_image"), 4),
    **dict.fromkeys(("num_position_embeddings", "num_patches", "max_num_patches"), 16),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width", "posemb_grid_size"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "laurel_rank", "hidden_size_per_layer_input", "d_rel"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "sliding_window", "attention_chunk_size", "sliding_window_size"), 16),
    **dict.fromkeys(("index_topk", "rel_extent", "ssm_state_size", "chunk_size", "num_pos_feats"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "codebook_size"), VOCABULARY),
    **dict.fromkeys(("num_embeddings", "num_embeds"), 64),
    **dict.fromkeys(("image_size", "max_image_size", "min_image_size", "resolution", "crop_size"), SIDE),
    **dict.fromkeys(("num_kv_shared_layers", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("num_global_layers", "num_res_blocks", "aligner_num_add_layers"), 1),
    "patch_size": PATCH,
    "window_size": 2,
    "base_channels": 32,
    "latent_channels": 32,
    "num_mel_bins": 16,
    "position_embedding_size": 64,
    "output_channels": 32,
    "n_groups": 2,
}
TOKEN = re.compile(r"(token_id|token_index|tokens_id|_token_idx|_patch_id|im_(end|start|newline)_id|boi_|eoi_)")
"""Keys whose values are numbers of tokens."""


def shrink(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The default config of a model type made small; `overrides` are keys of the config, dicts reach into sub-configs.

    Sizes go by role (text 64 wide, vision and audio 32, others 48); a width that names another part's width follows it
    (`out_hidden_size`). Lists with one entry per layer are cut to the first layer of each kind, at least two; lists of
    layer numbers follow. Special tokens beyond the vocabulary get new numbers from 200 on, the same for the same token.
    `overrides` come last and are taken as they are.
    """
    config = AutoConfig.for_model(model_type)
    return from_values(type(config), small_values(config), **overrides)


def small_values(config: PreTrainedConfig) -> dict[str, Any]:
    """The config as a dict, made small: what `shrink` starts from."""
    values = copy.deepcopy(config.to_dict())
    for key in config.sub_configs:  # some configs write their sub-configs only when they were given
        sub = getattr(config, key, None)
        if isinstance(sub, PreTrainedConfig):
            values[key] = copy.deepcopy(sub.to_dict())
    _drop(values)
    widths = _widths(values)
    _shrink(values, role="text", widths=widths)
    _renumber(values, {})
    return values


def from_values(cls: type[PreTrainedConfig], values: Mapping[str, Any], **overrides: Any) -> PreTrainedConfig:
    """A config from a (small) dict with deep overrides."""
    merged = _deep(dict(values), overrides)
    return cls.from_dict(merged)


def _widths(values: Mapping[str, Any]) -> dict[int, int]:
    """Original hidden sizes of text and vision -> new ones, for the keys that repeat another part's width."""
    found: dict[int, int] = {}

    def walk(here: Mapping[str, Any], role: str) -> None:
        for key in ("hidden_size", "d_model", "embed_dim", "hidden_dim"):
            if isinstance(here.get(key), int):
                found.setdefault(here[key], WIDTH[role])
        for key, value in here.items():
            if isinstance(value, dict) and "model_type" in value:
                walk(value, _role(key, role))

    for key, value in values.items():  # the language model first: its width wins where two have the same
        if isinstance(value, dict) and "model_type" in value and _role(key, "other") == "text":
            walk(value, "text")
    walk(values, "text")
    return found


def _role(key: str, outer: str) -> str:
    for role, pattern in (("vision", _VISION_KEYS), ("text", _TEXT_KEYS), ("audio", _AUDIO_KEYS)):
        if pattern.search(key):
            return role if outer in ("text", "other") else outer
    return outer if key in ("encoder", "vlm_config", "backbone_config") else "other"


def _shrink(values: dict[str, Any], *, role: str, widths: Mapping[int, int]) -> None:
    subs = [key for key, value in values.items() if isinstance(value, dict) and "model_type" in value]
    for key in subs:
        _shrink(values[key], role=_role(key, role), widths=widths)
    _cut_layers(values)
    width = WIDTH[role]
    heads = {key: values[key] for key in _HEADS if isinstance(values.get(key), int)}
    for key in list(values):
        if key not in subs:
            values[key] = _smaller(key, values[key], width, widths)
    for key in _KV_HEADS:
        if isinstance(values.get(key), int):
            full = values[key] in heads.values()
            values[key] = min(values[key], width // 16 if full else 2)
    _ropes(values, width)
    if "mamba_num_heads" in values and values.get("mamba_num_heads"):
        values["mamba_num_heads"] = values.get("expand", 2) * width // 16
    if isinstance(values.get("qk_head_dim"), int) and isinstance(values.get("qk_nope_head_dim"), int):
        values["qk_head_dim"] = values["qk_nope_head_dim"] + (values.get("qk_rope_head_dim") or 0)


def _smaller(key: str, value: Any, width: int, widths: Mapping[int, int]) -> Any:
    """A size made small; anything else as it is."""
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        return _smaller_list(key, list(value), width)
    if type(value) is not int or value <= 0:
        return value
    for keys, size in (
        (_WIDTHS, width),
        (_FFN, 2 * width),
        (_EXPERT_FFN, 32),
        (_HEADS, width // 16),
        (_HEAD_DIMS, 16),
        (_TO_TEXT, WIDTH["text"]),
    ):
        if key in keys:
            return min(value, size)
    if key in ("encoder_hidden_size", "vision_hidden_size", "projector_input_dim", "vision_output_dim"):
        return min(value, widths.get(value, WIDTH["vision"]))
    if key in ("thinker_hidden_size", "image_token_embed_dim"):
        return min(value, WIDTH["text"])
    return min(value, _FIXED[key]) if key in _FIXED else value


def _smaller_list(key: str, value: list[int], width: int) -> list[int]:
    largest = max(value)
    if key in ("embed_dim", "hidden_sizes"):
        return [max(16, item * 64 // largest // 16 * 16) for item in value]
    if key in ("num_heads", "num_groups", "num_attention_heads"):
        return [max(1, item * 4 // largest) for item in value]
    if key == "depths":
        return [1] * len(value)
    if key == "image_size":
        return [min(item, SIDE) for item in value]
    if key == "patch_size":
        return [min(item, PATCH) for item in value]
    if key == "downsample_channels":
        return [32] * (len(value) - 1) + [WIDTH["vision"]]
    if key == "channel_multiplier":
        return [1] * len(value)
    return value


def _cut_layers(values: dict[str, Any]) -> None:
    """Two layers, or one of each kind, in their order."""
    for key in ("layers_block_type", "num_hidden_layers", "depth", "n_layers", "num_layers"):
        if key == "layers_block_type" and key in values:
            values[key] = list(dict.fromkeys(values[key]))
            return
        if isinstance(values.get(key), int) and values[key] > 2:
            break
    else:
        _cut_depths(values, 2)
        return
    depth = values[key]
    per_layer: dict[str, list[Any]] = {}
    numbers: dict[str, list[int]] = {}
    for name, value in values.items():
        if not isinstance(value, (list, tuple)) or not value:
            continue
        counted = all(type(item) is int and 0 <= item < depth for item in value)
        if len(value) == depth and not (counted and list(value) == list(range(depth))):
            per_layer[name] = list(value)
        elif counted and re.search(r"layers|ind(ex|ic)es|idxs|layer_ids", name):
            numbers[name] = list(value)
    special = {int(layer): _special(sizes, values) for layer, sizes in (values.get("per_layer_config") or {}).items()}
    keep: list[int] = []
    seen: set[tuple[str, str]] = set()
    for layer in range(depth):
        here = {(name, str(value[layer])) for name, value in per_layer.items()}
        here |= {(name, str(layer in value)) for name, value in numbers.items()}
        here |= {("per_layer_config", str(special.get(layer)))}
        if here - seen:
            keep.append(layer)
            seen |= here
    keep = sorted((keep + [layer for layer in range(depth) if layer not in keep])[: max(2, len(keep))])
    _cut_depths(values, len(keep))
    values[key] = len(keep)
    for name, value in per_layer.items():
        values[name] = [value[layer] for layer in keep]
    for name, value in numbers.items():
        values[name] = [keep.index(layer) for layer in keep if layer in value]
    if special:
        values["per_layer_config"] = {
            str(keep.index(layer)): sizes for layer, sizes in special.items() if layer in keep
        }


def _special(sizes: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a single layer: twice the others' where they were larger than those."""
    found = {}
    for name, size in sizes.items():
        small = _smaller("num_attention_heads" if name in _KV_HEADS else name, size, WIDTH["text"], {})
        larger = name not in _KV_HEADS and type(size) is int and size > (values.get(name) or size)
        found[name] = 2 * small if larger else small
    return found


def _cut_depths(values: dict[str, Any], depth: int) -> None:
    for key in _DEPTHS:
        if isinstance(values.get(key), int):
            values[key] = min(values[key], depth)
    for key, value in values.items():  # layers whose output is read: -1 or -2 stay, others count from the end
        if re.search(r"feature_layer|insert_layer_id", key):
            many = isinstance(value, (list, tuple))
            cut = [max(-depth, min(item, depth - 1)) for item in (value if many else [value]) if type(item) is int]
            values[key] = cut if many else (cut[0] if cut else value)


def _ropes(values: dict[str, Any], width: int) -> None:
    ropes = values.get("rope_parameters")
    if not isinstance(ropes, dict):
        return
    head_dim = values.get("head_dim") or width // (values.get("num_attention_heads") or width // 16)
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        half = int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2
        section = rope.get("mrope_section")
        if isinstance(section, (list, tuple)) and section:
            share = [max(1, math.floor(item * half / sum(section))) for item in section]
            share[0] += half - sum(share)
            if share[0] < 1:  # fewer pairs than axes: the head must be wider
                raise ValueError(f"head_dim {head_dim} leaves {half} pairs for {len(section)} axes")
            rope["mrope_section"] = share
        for name in ("short_factor", "long_factor"):
            if isinstance(rope.get(name), (list, tuple)):
                rope[name] = list(rope[name])[:half]


def _renumber(values: dict[str, Any], known: dict[int, int]) -> None:
    """Special tokens beyond the vocabulary get numbers from 200 on."""

    def new(token: Any) -> Any:
        if type(token) is not int or token < 200:
            return token
        return known.setdefault(token, 200 + len(known))

    for key, value in values.items():
        if isinstance(value, dict):
            _renumber(value, known)
        elif isinstance(key, str) and TOKEN.search(key):
            values[key] = [new(item) for item in value] if isinstance(value, (list, tuple)) else new(value)


def _drop(values: dict[str, Any]) -> None:
    """Take out what is no size: labels, where the config came from, names of stages that are cut."""
    for key in (
        "transformers_version",
        "_name_or_path",
        "id2label",
        "label2id",
        "stage_names",
        "out_features",
        "out_indices",
    ):
        values.pop(key, None)
    for value in values.values():
        if isinstance(value, dict):
            _drop(value)


def _deep(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            values[key] = _deep(dict(values[key]), value)
        else:
            values[key] = value
    return values
