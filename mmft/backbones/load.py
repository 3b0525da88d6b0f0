"""A backbone: config, weights (safetensors only) and processor of any vision-language model, dual encoder,
encoder-decoder or encoder of transformers.

A model that writes text about pictures or sound must come with a processor; any other may have a processor, a
tokenizer, an image processor, a feature extractor or nothing, and `Backbone.processor` is what its folder holds.

Nothing here runs code from a model folder and nothing is unpickled.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from mmft.backbones.classes import default_config, model_class, native_types, on_meta, supports_sdpa, writes_text
from mmft.backbones.joint import register
from mmft.backbones.parts import Parts, find_parts
from mmft.backbones.processors import whole_processor
from mmft.backbones.quantize import (
    check_quantized,
    guard_cpu,
    guard_stored,
    is_quantized,
    quantization_config,
    stored_quantization,
    wanted_names,
)
from mmft.errors import BackboneError
from mmft.headers import header_problem
from mmft.recipe.schema import ModelSection, QuantizationSection

__all__ = [
    "Backbone",
    "chat_template",
    "load_backbone",
    "load_processor",
    "meta_backbone",
    "meta_model",
    "model_class",
    "resolve_model",
]
_SHIPPED = "shipped:"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt", "model.pt")


@dataclass(frozen=True)
class Backbone:
    """A model with its processor and its parts. `folder` holds the weights (a snapshot folder for hub ids); None for
    a model that is only on the meta device. `processor` is None where the model has none (or none was asked for)."""

    model: Any
    processor: Any
    parts: Parts
    folder: Path | None
    name: str
    revision: str | None
    quantized: bool

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer. Raises BackboneError for a model that came without one."""
        found = getattr(self.processor, "tokenizer", self.processor)
        if not hasattr(found, "pad_token_id"):
            raise _no_processor(self.name, self.processor)
        return found

    @property
    def pad_token_id(self) -> int:
        """The padding token; the end-of-text token where a model has none. Raises BackboneError without either."""
        for found in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if found is not None:
                return int(found)
        raise BackboneError(
            f"the tokenizer of {self.name} has neither a pad nor an eos token",
            where=self.name,
            do="set pad_token in the tokenizer's config",
        )


def resolve_model(name_or_path: str) -> tuple[str, Path | None]:
    """What `from_pretrained` is given, and the local folder where that is known without asking the hub.

    Raises BackboneError for a folder that does not exist or holds no config.json.
    """
    if name_or_path.startswith(_SHIPPED):
        from mmft.backbones.shipped_dual import resolve_any

        folder = Path(resolve_any(name_or_path.removeprefix(_SHIPPED)))
        return str(folder), folder
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BackboneError(
                f"{name_or_path} holds no config.json",
                where=f"model.name_or_path: {name_or_path}",
                allowed="a folder written by transformers' save_pretrained, a hub id, shipped:NAME",
                do="give the folder that config.json lies in",
            )
        return str(folder.resolve()), folder.resolve()
    if name_or_path.startswith(("/", "./", "../", "~")) or name_or_path.count("/") > 1:
        raise BackboneError(
            f"there is no folder {name_or_path}",
            where=f"model.name_or_path: {name_or_path}",
            allowed="a folder, a hub id like ORGANISATION/NAME, shipped:NAME",
            do="check the path",
        )
    return name_or_path, None


def load_backbone(
    model: ModelSection,
    quantization: QuantizationSection | None = None,
    *,
    device: torch.device | None = None,
    processor: bool = True,
) -> Backbone:
    """Load weights and processor. The weights are frozen here; adapters decide what is trained.

    `processor=False` leaves the processor out, also for models that must have one. Raises BackboneError when the
    folder or hub id, its config, weights or processor is wrong, or the attention kernel is not supported.
    """
    quantization = quantization or QuantizationSection()
    target, folder = resolve_model(model.name_or_path)
    config = read_config(model)
    cls = model_class(config, name=model.name_or_path)
    attention = _attention(model, cls, config)
    if folder is not None:
        _check_weights(model, folder)
    on_cpu = device is None or device.type == "cpu"
    stored = stored_quantization(config, quantization, name=model.name_or_path)
    options: dict[str, Any] = {
        "revision": model.revision,
        "dtype": getattr(torch, model.dtype),
        "attn_implementation": attention,
        "use_safetensors": True,
    }
    wanted: list[str] = []
    if stored is not None:
        options["device_map"] = {"": device or torch.device("cpu")}
    elif is_quantized(quantization):
        empty = on_meta(cls, config)
        parts = find_parts(empty)
        wanted = wanted_names(empty, parts, quantization, on_cpu=on_cpu)
        everything = [name for name, module in empty.named_modules() if isinstance(module, torch.nn.Linear)]
        options["quantization_config"] = quantization_config(quantization, wanted, linears=everything)
        options["device_map"] = {"": device or torch.device("cpu")}
    try:
        # Not cls.from_pretrained: Qwen2.5-Omni's own one cannot return the loading info (and unpickles its voices).
        load: Any = PreTrainedModel.from_pretrained
        loaded, found = load.__func__(cls, target, config=config, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise _load_error(model, error, what="weights") from error
    _check_missing(model, config, sorted(found["missing_keys"]))
    if stored is not None:
        guard_stored(loaded, stored, name=model.name_or_path, on_cpu=on_cpu)
    elif is_quantized(quantization):
        check_quantized(loaded, wanted)
        guard_cpu(loaded)
    elif device is not None:
        loaded.to(device)
    loaded.requires_grad_(False)
    loaded.eval()
    if on_cpu:
        _channels_last(loaded)
    return Backbone(
        model=loaded,
        processor=_processor_of(model, config, folder) if processor else None,
        parts=find_parts(loaded),
        folder=folder or _snapshot(target, model.revision),
        name=model.name_or_path,
        revision=model.revision,
        quantized=bool(wanted) or stored is not None,
    )


def _check_missing(model: ModelSection, config: Any, missing: list[str]) -> None:
    """Weights that no file holds start at random: transformers only logs that. Encoders may come without a pooler."""
    if not missing:
        return
    text = f"{model.name_or_path} lacks {len(missing)} weights of its model: {', '.join(missing[:5])}"
    if not writes_text(config):
        warnings.warn(f"{text}; they start at random", stacklevel=3)
        return
    raise BackboneError(
        text,
        where=f"model.name_or_path: {model.name_or_path}",
        allowed="a checkpoint that holds every weight of the class its config names",
        do="complete the folder, or correct `architectures` in its config.json",
    )


def load_processor(model: ModelSection) -> Any:
    """The processor of a model that is to see chat data: it has a tokenizer. Raises BackboneError when there is none
    that transformers can build."""
    found = _any_processor(model)
    if not hasattr(found, "tokenizer"):
        raise _no_processor(model.name_or_path, found)
    return found


def meta_backbone(model: ModelSection) -> Backbone:
    """The same backbone with weights on the meta device: full size in seconds, nothing is read but the config (and
    the processor, None where it cannot be loaded)."""
    target, folder = resolve_model(model.name_or_path)
    config = read_config(model)
    empty = on_meta(model_class(config, name=model.name_or_path), config, dtype=getattr(torch, model.dtype))
    try:
        processor = _processor_of(model, config, folder)
    except BackboneError:
        processor = None
    return Backbone(empty, processor, find_parts(empty), folder, model.name_or_path, model.revision, False)


def meta_model(model_type: str) -> Any:
    """A model of a bare type (`qwen2_vl`) with its default config on the meta device; None when there is no such
    type. Raises BackboneError when the type is no vision-language model or has no usable default config."""
    if model_type not in native_types():
        return None
    section = ModelSection(name_or_path=model_type)
    try:
        config = default_config(model_type)
        return on_meta(model_class(config, name=model_type), config)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _load_error(section, error, what="default config") from error


def chat_template(backbone: Backbone) -> str:
    """The chat template, which only chat rendering needs. Raises BackboneError when the model has none."""
    for holder in (backbone.processor, backbone.tokenizer):
        template = getattr(holder, "chat_template", None)
        if template:
            return template if isinstance(template, str) else template["default"]
    raise BackboneError(
        f"{backbone.name} has no chat template",
        where=backbone.name,
        do="use a chat (instruct) model, or add chat_template.jinja to the model folder",
    )


def _any_processor(model: ModelSection) -> Any:
    """What AutoProcessor finds: a processor, or a tokenizer, image processor or feature extractor alone."""
    from transformers import AutoProcessor

    target, _ = resolve_model(model.name_or_path)
    try:
        return AutoProcessor.from_pretrained(target, revision=model.revision, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise _load_error(model, error, what="processor") from error


def _processor_of(model: ModelSection, config: Any, folder: Path | None) -> Any:
    """The processor by the rule of this module: required of models that write text about media, else optional."""
    if writes_text(config):
        return load_processor(model)
    target, _ = resolve_model(model.name_or_path)
    try:
        found = _any_processor(model)
    except BackboneError:
        return None
    # Without any file transformers makes up a tokenizer of five special tokens.
    made_up = folder is not None and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)
    if hasattr(found, "pad_token_id") and made_up:
        return None
    return whole_processor(found, config, target, revision=model.revision)


def _no_processor(name: str, found: Any) -> BackboneError:
    return BackboneError(
        f"{name} has no processor for pictures and text, only "
        + ("the weights" if found is None else f"a {type(found).__name__}"),
        where=f"model.name_or_path: {name}",
        do="add the processor files (preprocessor_config.json, processor_config.json, tokenizer.json)",
    )


def read_config(model: ModelSection) -> Any:
    """The config. A folder whose classes live in its own code is refused: that code would have to be run."""
    from transformers import AutoConfig, PreTrainedConfig

    register()
    target, _ = resolve_model(model.name_or_path)
    try:
        raw, _ = PreTrainedConfig.get_config_dict(target, revision=model.revision)
        kind = raw.get("model_type")
        if raw.get("auto_map") and kind not in native_types():
            code = (
                str(next(iter(raw["auto_map"].values()))).partition(".")[0].partition("--")[2]
                or str(next(iter(raw["auto_map"].values()))).partition(".")[0]
            )
            raise BackboneError(
                f"{model.name_or_path} needs code of its own ({code}.py) and mmft runs no code from model folders",
                where=f"model.name_or_path: {model.name_or_path}, model_type {kind!r}",
                allowed="model types that transformers implements itself",
                do="use a conversion of this model to a native transformers class (often named ...-hf)",
            )
        return AutoConfig.from_pretrained(target, revision=model.revision)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _load_error(model, error, what="config") from error


def _channels_last(model: torch.nn.Module) -> None:
    """Lay out two-dimensional convolutions for oneDNN, in which convolutional towers take half the time.

    `model.to(memory_format=...)` would also take the five-dimensional weights of `Conv3d`, and fail.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _attention(model: ModelSection, cls: Any, config: Any) -> str:
    """The attention kernel: the one asked for, which must be supported; when none was, sdpa, else eager."""
    supported = ["eager"]
    supported += ["sdpa"] if supports_sdpa(cls, config) else []
    supported += ["flash_attention_2"] if cls._supports_flash_attn else []
    supported += ["flex_attention"] if cls._supports_flex_attn else []
    if "attn_implementation" not in model.model_fields_set and model.attn_implementation not in supported:
        return "eager"
    if model.attn_implementation not in supported:
        raise BackboneError(
            f"{cls.__name__} has no {model.attn_implementation} attention",
            where="model.attn_implementation",
            allowed=", ".join(supported),
            do=f"set model.attn_implementation: {supported[-1] if 'sdpa' not in supported else 'sdpa'}",
        )
    return str(model.attn_implementation)


def _check_weights(model: ModelSection, folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        if problem := header_problem(path):
            raise _load_error(model, SafetensorError(f"{path.name}: {problem}"), what="weights")
    if any(folder.glob("*.safetensors")):
        return
    pickled = [name for name in _PICKLES if (folder / name).exists()] or [path.name for path in folder.glob("*.bin")]
    if pickled:
        raise BackboneError(
            f"{model.name_or_path} holds its weights as a pickle ({pickled[0]}), which can run code when it is read",
            where=str(folder / pickled[0]),
            allowed="*.safetensors",
            do="convert the weights to safetensors on a machine that trusts them (save_pretrained does it)",
        )
    raise BackboneError(
        f"{model.name_or_path} holds no weights",
        where=str(folder),
        allowed="*.safetensors",
        do="copy or download the weight files into the folder",
    )


def _snapshot(target: str, revision: str | None) -> Path | None:
    """The hub cache's folder of a model that was just loaded."""
    from transformers.utils import cached_file

    found = cached_file(
        target, "config.json", revision=revision, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    return Path(found).parent if found else None


def _load_error(model: ModelSection, error: Exception, *, what: str) -> BackboneError:
    """The upstream failure as one of ours, with its first line and what to do about it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0][:300] if lines else type(error).__name__
    where = f"model.name_or_path: {model.name_or_path}" + (f", revision {model.revision}" if model.revision else "")
    lowered = str(error).lower()
    if "offline" in lowered or "couldn't connect" in lowered or "could not connect" in lowered or "cached" in lowered:
        return BackboneError(
            f"{model.name_or_path} is not in the hub cache and the hub cannot be reached",
            where=where,
            allowed="a local folder, a hub id that is cached or reachable, shipped:nano-vlm",
            do="unset HF_HUB_OFFLINE, check the network, or download the model first (hf download)",
        )
    if "attention" in lowered and what == "weights":
        return BackboneError(
            f"{model.attn_implementation} cannot be used here: {text}",
            where="model.attn_implementation",
            allowed="eager, sdpa, and kernels whose package is installed",
            do="set model.attn_implementation: sdpa (or eager)",
        )
    if "safetensors" in lowered and what == "weights" and not isinstance(error, SafetensorError):
        return BackboneError(
            f"{model.name_or_path} has no safetensors weights: {text}",
            where=where,
            allowed="*.safetensors",
            do="use a revision with safetensors, or convert the weights on a machine that trusts them",
        )
    return BackboneError(
        f"the {what} of {model.name_or_path} cannot be loaded: {text}",
        where=where,
        allowed="a folder, a hub id, shipped:NAME of a model that transformers implements",
        do="check the name, the revision, and that the folder is complete",
    )
