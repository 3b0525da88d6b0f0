"""Which class of transformers a config is built with, and models without weights (on the meta device)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from mmft.errors import BackboneError

GENERATING = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
)
"""Auto mappings of models that write text about pictures or sound."""
_ORDER = (
    *GENERATING[:2],
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
    GENERATING[2],
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)

_COMPLETED: dict[str, dict[str, Any]] = {
    # 1152 is not divisible by its default of 14 heads; SigLIP so400m, which the checkpoints use, has 16.
    "aya_vision": {"vision_config.num_attention_heads": 16},
    # The map of picture tokens is only in checkpoints; the constructor looks the placeholder up in it.
    "chameleon": {"vocabulary_map": {"<image>": 8711}},
    "emu3": {"vocabulary_map": {"<image>": 151851, "<|extra_200|>": 151846}},
    # One set of rotary parameters per kind of layer is looked up, none is there by default.
    "cohere_compass": {
        "text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    # Dense or sparse has to be said of every layer.
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", *["sparse"] * 31]},
    # Sizes that are None by default and are multiplied, divided or allocated; those of the published checkpoint.
    "diffusion_gemma": {
        "text_config.num_experts": 128,
        "text_config.top_k_experts": 8,
        "text_config.moe_intermediate_size": 704,
    },
    "granite4_vision": {"deepstack_layer_map": [(-19, 9), (-13, 6), (-7, 3), (-1, 0)], "downsample_rate": "1/2"},
    # By default these are text models: their towers are optional.
    "gemma4": {"vision_config": None, "audio_config": None},
    "gemma4_unified": {"vision_config": None, "audio_config": None},
    "hunyuan_vl": {"text_config.head_dim": 128},
    # The default tower is a ResNet, which has no width to read.
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_large_patch14_336",
        "vision_config.model_args": {"embed_dim": 1024, "global_pool": "", "img_size": [448, 448]},
    },
    # The talker's config lacks what the talker's constructor reads.
    "qwen3_omni_moe": {
        "talker_config.text_config.shared_expert_intermediate_size": 768,
        "talker_config.spatial_merge_size": 2,
    },
    "qwen4_exp": {
        "text_config.indexer_n_heads": 16,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 128,
        "text_config.indexer_budget": 2048,
        "text_config.indexer_compress_ratio": 4,
    },
}
"""Values without which the default config of a type cannot be built or lacks its towers (a defect of the default, not
of the type); None stands for the default sub-config."""


def model_class(config: Any, *, name: str | None = None) -> Any:
    """The `PreTrainedModel` class that a config is built with.

    `config.architectures[0]` where transformers has that class for this type of config. Otherwise the first auto
    mapping that knows the config: image-text-to-text, multimodal language models, dual encoders, speech to text,
    encoder-decoders, base models (plain encoders of text, pictures or sound). Raises BackboneError (naming `name`)
    for a decoder-only language model, which sees and hears nothing, and where there is no class.
    """
    found = next((_mapped(mapping, config) for mapping in _ORDER[:-1] if _mapped(mapping, config)), None)
    decoder = _mapped("MODEL_FOR_CAUSAL_LM_MAPPING", config) and not _mapped("MODEL_FOR_MASKED_LM_MAPPING", config)
    if found is None and not decoder:
        found = _mapped(_ORDER[-1], config)
    architecture = str(next(iter(getattr(config, "architectures", None) or ()), ""))
    if not decoder or found is not None:
        found = _native(architecture, config) or found
    if found is not None:
        return found
    raise BackboneError(
        f"{name or config.model_type} is a {config.model_type} model, not a vision-language model"
        + (f": {architecture} is no class of transformers" if architecture and not decoder else ""),
        where=f"model.name_or_path: {name or config.model_type}",
        allowed="models of transformers that see or hear (llava, qwen2_vl, smolvlm, ...), dual encoders (clip), "
        "encoder-decoders (whisper), encoders (bert, vit)",
        do="choose an image-text-to-text model",
    )


def writes_text(config: Any) -> bool:
    """True for models that write text about pictures or sound: their folder must hold a processor with a tokenizer.

    Encoder-decoders composed of any two models (no processor class is theirs), dual encoders, language models and
    encoders may come without.
    """
    known = any(_mapped(mapping, config) is not None for mapping in GENERATING)
    return known and not is_composed(config) and bool(model_class(config).can_generate())


def is_composed(config: Any) -> bool:
    """True for an encoder and a decoder that are two whole models of any type."""
    return set(getattr(config, "sub_configs", None) or ()) == {"encoder", "decoder"}


def supports_sdpa(cls: Any, config: Any) -> bool:
    """Whether a model class has torch's attention kernel; of a composed model, both of its halves."""
    halves = []
    if is_composed(config):
        halves = [_mapped("MODEL_MAPPING", config.encoder), _mapped("MODEL_FOR_CAUSAL_LM_MAPPING", config.decoder)]
    return all(half._supports_sdpa for half in (cls, *halves) if half is not None)


def default_config(model_type: str) -> Any:
    """The default config of a model type, completed where transformers' own defaults cannot be built."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    for path, value in _COMPLETED.get(model_type, {}).items():
        *above, last = path.split(".")
        holder = config
        for step in above:
            holder = getattr(holder, step)
        setattr(holder, last, type(holder).sub_configs[last]() if value is None else value)
    return config


@cache
def native_types() -> frozenset[str]:
    """Model types that transformers implements itself."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return frozenset(CONFIG_MAPPING.keys())


def on_meta(cls: Any, config: Any, dtype: torch.dtype | None = None) -> Any:
    """An instance of the model class without memory behind its weights."""
    with torch.device("meta"):
        empty = cls._from_config(config, dtype=dtype) if dtype is not None else cls._from_config(config)
    empty.tie_weights()
    return empty


def _mapped(mapping: str, config: Any) -> Any:
    """The class of an auto mapping for a config. Asked by item: `in` misses types that share a config class."""
    from transformers.models.auto import modeling_auto

    try:
        classes = getattr(modeling_auto, mapping)[type(config)]
    except KeyError:
        return None
    return classes[0] if isinstance(classes, (tuple, list)) else classes


def _native(architecture: str, config: Any) -> Any:
    """The class of that name in transformers, when it is a model of this type of config."""
    import transformers

    found = getattr(transformers, architecture, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        return None
    return found if isinstance(config, found.config_class or ()) else None
