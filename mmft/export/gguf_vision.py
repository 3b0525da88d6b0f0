"""What an mmproj file of llama.cpp holds: a CLIP or SigLIP tower and its projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmft.errors import ExportError
from mmft.export.gguf_tensors import Reader, Tensor
from mmft.files import read_json_file

POSSIBLE = "llava with a CLIP tower and a GELU projector; smolvlm and idefics3"
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def mmproj_names(config: Any, reader: Reader) -> tuple[list[Tensor], list[str]]:
    """The tensors of the file, and notes. Raises ExportError for a tower or projector llama.cpp has no graph for."""
    if config.model_type == "llava":
        return _llava(config, reader)
    if config.model_type in ("smolvlm", "idefics3"):
        return _idefics(config, reader)
    raise _impossible(f"the tower and projector of {config.model_type} are not known here")


def _impossible(what: str) -> ExportError:
    return ExportError(
        what, where="config.json", allowed=POSSIBLE, do="use llama.cpp's own convert_hf_to_gguf.py --mmproj"
    )


def _llava(config: Any, reader: Reader) -> tuple[list[Tensor], list[str]]:
    vision = config.vision_config
    if vision.model_type != "clip_vision_model" or config.projector_hidden_act != "gelu":
        raise _impossible(f"llava with a {vision.model_type} tower and a {config.projector_hidden_act} projector")
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
        raise _impossible("llava with several feature layers or with the class token kept")
    model = reader.names.model
    tower = reader.prefix(model.model.vision_tower)
    tensors = _tower(reader, tower, "vision_tower.vision_model.", vision, skip=("post_layernorm",))
    projector = reader.prefix(model.model.multi_modal_projector)
    for name in reader.below(projector):
        layer, leaf = name.removeprefix(projector).split(".")
        tensors.append(Tensor(f"mm.{ {'linear_1': 0, 'linear_2': 2}[layer] }.{leaf}", name, full=leaf == "bias"))
    return tensors, ["the tower's last norm is left out: llava does not use it"]


def _idefics(config: Any, reader: Reader) -> tuple[list[Tensor], list[str]]:
    model = reader.names.model
    tower = reader.prefix(model.model.vision_model)
    tensors = _tower(reader, tower, "model.vision_model.", config.vision_config)
    connector = reader.prefix(model.model.connector)
    tensors += [Tensor("mm.model.fc.weight", name) for name in reader.below(connector)]
    return tensors, []


def _tower(reader: Reader, prefix: str, known: str, vision: Any, *, skip: tuple[str, ...] = ()) -> list[Tensor]:
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    tensors = []
    for name in reader.below(prefix):
        plain = name.removeprefix(prefix).removeprefix("vision_model.")
        if plain.startswith(skip) or plain.endswith("position_ids"):
            continue
        new = table.get_name(known + plain, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise _impossible(f"gguf has no name for {name}")
        vector = len(reader.names.shapes[name]) == 1
        tensors.append(Tensor(new, name, full=vector or "patch_embd" in new or "position_embd" in new))
    return tensors


def mmproj_metadata(writer: Any, config: Any, folder: Path, *, name: str, kind: str) -> None:
    """The keys llama.cpp's `clip.cpp` reads. Mean and deviation of the pixels come from the folder's processor."""
    import gguf

    vision = config.vision_config
    llava = config.model_type == "llava"
    writer.add_type("mmproj")
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp" if llava else "idefics3")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    activation = vision.hidden_act
    writer.add_vision_use_gelu(activation.startswith("gelu"))
    if activation not in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        raise _impossible(f"a tower with the activation {activation}")
    if llava:
        layer = config.vision_feature_layer
        # llama.cpp stops after this many blocks; without the key it takes the last but one.
        deepest = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
        writer.add_array("clip.vision.feature_layer", [deepest])
    else:
        writer.add_vision_projector_scale_factor(config.scale_factor)
    mean, std = _pixels(folder, llava)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)


def _pixels(folder: Path, llava: bool) -> tuple[list[float], list[float]]:
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            values = read_json_file(folder / file)
            values = values.get("image_processor") or values
            if values.get("image_mean") and values.get("image_std"):
                return [float(x) for x in values["image_mean"]], [float(x) for x in values["image_std"]]
    return (_CLIP_MEAN, _CLIP_STD) if llava else ([0.5] * 3, [0.5] * 3)
