"""GGUF for llama.cpp: the language model, and for LLaVA and SmolVLM kinds the tower with its projector (mmproj).

Tensor names come from gguf's own `TensorNameMap`; keys, the rotary permutation of llama's q and k and the choice of
types follow llama.cpp's converter. Every tensor is read back with `GGUFReader` and compared before the folder appears.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoConfig

from mmft.errors import ExportError
from mmft.export.dequantized import open_weights
from mmft.export.extras import needs
from mmft.export.gguf_tensors import Reader, Tensor
from mmft.export.gguf_vision import mmproj_metadata, mmproj_names
from mmft.export.names import map_names, meta_model
from mmft.export.shards import Weights
from mmft.files import atomic_folder, require_free, write_json

REPORT = "gguf_report.json"
LANGUAGE = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""Language models (model_type) that can be written -> gguf's architecture."""
_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def export_gguf(folder: Path, out: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Write `NAME-TYPE.gguf` and, where the tower can be written, `mmproj-NAME-TYPE.gguf` to the folder `out`.

    `dtype` is float16, bfloat16 or float32 (the folder's own if None); vectors, and the tower's patch and position
    embeddings stay in float32, as llama.cpp wants them. Returns files, tensor counts, the tokenizer's kind and `notes`
    on what a reader should know. Raises ExportError for a language model or tower that cannot be written, listing
    those that can, for a tokenizer that cannot, and for a tensor that does not read back. Memory: one tensor.
    """
    if importlib.util.find_spec("gguf") is None:
        raise needs("gguf", "gguf")
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    if text.model_type.removesuffix("_text") not in LANGUAGE:
        raise ExportError(
            f"the language model {text.model_type!r} of {config.model_type} cannot be written as GGUF",
            where=str(folder / "config.json"),
            allowed=", ".join(LANGUAGE),
            do="convert the Hugging Face folder (--to hf) with llama.cpp's own convert_hf_to_gguf.py, if it knows it",
        )
    report: dict[str, Any] = {"files": [], "notes": []}
    with open_weights(folder) as weights:
        names = map_names(meta_model(folder), weights.entries)
        kind = _TYPES[dtype or _own_type(weights)]
        require_free(out, sum(entry.nbytes for entry in weights.entries.values()) * 2, what=f"the GGUF of {out.name}")
        reader = Reader(weights, names)
        with atomic_folder(out) as target:
            stem = folder.resolve().name if folder.name not in ("merged", "model") else folder.resolve().parent.name
            report |= _language(folder, target / f"{stem}-{kind}.gguf", text, reader=reader, kind=kind)
            if text is not config:
                found = _vision(folder, target / f"mmproj-{stem}-{kind}.gguf", config, reader=reader, kind=kind)
                report["notes"] += found.pop("notes")
                report |= found
            report["files"] = sorted(path.name for path in target.glob("*.gguf"))
            write_json(target / REPORT, report)
    return report


def _own_type(weights: Weights) -> str:
    sizes: dict[str, int] = {}
    for entry in weights.entries.values():
        name = str(entry.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + entry.nbytes
    found = max(sizes, key=lambda name: sizes[name])
    return found if found in _TYPES else "float16"


def _language(folder: Path, path: Path, text: Any, *, reader: Reader, kind: str) -> dict[str, Any]:
    import gguf

    from mmft.export.gguf_tokens import add_tokenizer

    arch = getattr(gguf.MODEL_ARCH, LANGUAGE[text.model_type.removesuffix("_text")])
    model: Any = reader.names.model
    prefix = reader.prefix(model.get_decoder())
    table = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    tensors = []
    for name in reader.below(prefix):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        new = table.get_name("model." + name.removeprefix(prefix), try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ExportError(f"gguf has no name for {name} in {arch.name}", do="report this model's type")
        part = name.split(".")[-2]
        change = _permute(heads[part]) if arch == gguf.MODEL_ARCH.LLAMA and part in heads else None
        tensors.append(Tensor(new, name, change, full=len(reader.names.shapes[name]) == 1))
    head = next((name for name in reader.names.shapes if name.endswith("lm_head.weight")), None)
    if head is not None and head in reader:
        tensors.append(Tensor("output.weight", head))
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    _language_metadata(writer, text, head_dim, name=path.stem, kind=kind)
    tokens = add_tokenizer(writer, folder, rows=reader.names.shapes[prefix + "embed_tokens.weight"][0])
    _write(writer, path, tensors, reader=reader, kind=kind)
    return {"architecture": gguf.MODEL_ARCH_NAMES[arch], "tensors": len(tensors), "type": kind, **tokens}


def _permute(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """llama.cpp turns neighbouring pairs (GPT-J's order), transformers the two halves of a head."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)

    return change


def _language_metadata(writer: Any, text: Any, head_dim: int, *, name: str, kind: str) -> None:
    import gguf

    rope = dict(getattr(text, "rope_parameters", None) or {})
    scaling = rope.get("rope_type", "default")
    if scaling not in ("default", "linear"):
        raise ExportError(
            f"rotary embeddings of type {scaling!r} cannot be written",
            where="config.json, rope_parameters",
            allowed="default, linear",
            do="convert the Hugging Face folder (--to hf) with llama.cpp's own convert_hf_to_gguf.py",
        )
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"F32": "ALL_F32"}.get(kind, f"MOSTLY_{kind}")))
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if head_dim * text.num_attention_heads != text.hidden_size or LANGUAGE.get(text.model_type) == "QWEN3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _vision(folder: Path, path: Path, config: Any, *, reader: Reader, kind: str) -> dict[str, Any]:
    import gguf

    try:
        tensors, notes = mmproj_names(config, reader)
    except ExportError as error:
        # The language part alone is of use; that the tower is missing is said in the report and by the verb.
        return {
            "mmproj": None,
            "notes": [f"no mmproj: {error.problems[0].what} (possible: {error.problems[0].allowed})"],
        }
    writer = gguf.GGUFWriter(None, "clip")
    mmproj_metadata(writer, config, folder, name=path.stem, kind=kind)
    _write(writer, path, tensors, reader=reader, kind=kind)
    notes = [
        *notes,
        "mmproj is proved tensor by tensor, not by outputs: compare answers in llama.cpp before relying on it",
    ]
    return {"mmproj": path.name, "mmproj_tensors": len(tensors), "notes": notes}


def _write(writer: Any, path: Path, tensors: list[Tensor], *, reader: Reader, kind: str) -> None:
    import gguf

    types = {tensor.name: "F32" if tensor.full else kind for tensor in tensors}
    for tensor in tensors:
        shape = reader.names.shapes[tensor.source]
        count = int(numpy.prod(shape))
        size = count * (4 if types[tensor.name] == "F32" else 2)
        raw = getattr(gguf.GGMLQuantizationType, types[tensor.name])
        writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.float32), size, raw_dtype=raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_values(tensor, reader, types[tensor.name]))
    writer.close()
    _read_back(path, tensors, reader=reader, types=types)


def _values(tensor: Tensor, reader: Reader, kind: str) -> numpy.ndarray:
    value = reader.read(tensor.source)
    value = tensor.change(value) if tensor.change is not None else value
    cast = value.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).contiguous()
    if not torch.equal(torch.isfinite(cast), torch.isfinite(value)):
        raise ExportError(f"{tensor.source} holds values that float16 cannot", do="export in bfloat16 or float32")
    return cast.view(torch.int16).numpy() if kind == "BF16" else cast.numpy()


def _read_back(path: Path, tensors: list[Tensor], *, reader: Reader, types: dict[str, str]) -> None:
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if found.keys() != {tensor.name for tensor in tensors}:
        raise ExportError(f"{path.name} does not hold the tensors that were written", do="report this")
    for tensor in tensors:
        want = _values(tensor, reader, types[tensor.name])
        got = found[tensor.name]
        same = bytes(numpy.ascontiguousarray(got.data).view(numpy.uint8)) == want.tobytes()
        if not same or tuple(reversed(got.shape.tolist())) != tuple(reader.names.shapes[tensor.source]):
            raise ExportError(f"{tensor.name} of {path.name} does not read back", do="report this; nothing was written")
