"""Encoders and dual encoders as ONNX graphs, each compared with torch in onnxruntime before the folder appears.

A dual encoder becomes `image.onnx` (or `audio.onnx`), `text.onnx` and `model.onnx` (both towers and the similarity),
any other encoder one `model.onnx`. Batch size, text and sound length are dynamic. Models that generate text are
refused: a graph of one forward is no generation, which also needs the cache and the image-token splice in the graph.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmft.errors import ExportError
from mmft.export.extras import needs
from mmft.export.names import model_class
from mmft.export.sidefiles import copy_files
from mmft.files import atomic_folder, write_json
from mmft.seeds import fold

REPORT = "onnx_report.json"
OPSET = 18
TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest value: float32 sums in another order, layer upon layer, come to
1e-6 to 1e-5; a wrong graph (a mask baked in, a dropped layer) is off by 1e-2 and more."""
_LIMIT = 1 << 30  # bytes of weights above which they go into a file beside the graph; protobuf ends at 2 GiB


@dataclass(frozen=True)
class _Input:
    """One input: its shape for batch `b` and length `n`, and the names of its dynamic axes."""

    name: str
    shape: tuple[int | str, ...]  # "batch", "length" or a size
    kind: str  # ids, mask, float
    last: int | None = None  # the token a text ends with, which some models pool at


@dataclass(frozen=True)
class _Graph:
    """One graph: what is traced and with what."""

    name: str
    module: nn.Module
    inputs: tuple[_Input, ...]
    outputs: tuple[str, ...]


def export_onnx(folder: Path, out: Path, *, dtype: str | None = None) -> dict[str, Any]:
    """Write the graphs of the model in `folder` (float32) to `out` and return what the check in onnxruntime found.

    The report holds per graph its inputs and outputs with their shapes, and the largest absolute and relative
    difference from torch on random inputs of two batch sizes and lengths, one row padded. Raises ExportError for a
    model that generates, one whose inputs are not known, a graph that torch cannot trace, and a difference beyond
    `TOLERANCE`. Price: the model in float32 and a copy of its weights.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise needs(package, "onnx")
    if dtype not in (None, "float32"):
        raise ExportError(
            f"ONNX graphs are written in float32, not {dtype}",
            where="--dtype",
            allowed="float32",
            do="leave --dtype out; shrink the graph with onnxruntime's own tools",
        )
    model = _load(folder)
    graphs = _graphs(model)
    report: dict[str, Any] = {"opset": OPSET, "tolerance": TOLERANCE, "graphs": {}}
    with atomic_folder(out) as target:
        for graph in graphs:
            _write(graph, target / f"{graph.name}.onnx")
            report["graphs"][graph.name] = _check(graph, target / f"{graph.name}.onnx")
        copy_files(folder, target)
        (target / "config.json").write_bytes((folder / "config.json").read_bytes())
        write_json(target / REPORT, report)
    return {"files": sorted(path.name for path in out.iterdir()), **report}


def _load(folder: Path) -> PreTrainedModel:
    kind = model_class(folder)
    try:
        model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"the model cannot be loaded: {str(error).splitlines()[0][:300]}", where=str(folder), do="check the folder"
        ) from error
    if model.can_generate() or model.config.is_encoder_decoder:
        raise ExportError(
            f"{type(model).__name__} generates text, and one forward as a graph is no generation (the cache, the "
            "place of the image tokens and the choice of the next token stay outside of it)",
            where=str(folder),
            allowed="encoders and dual encoders (clip, siglip, clap, vit, dinov2, bert, wav2vec2, ...)",
            do="serve the Hugging Face folder (--to hf), or take --to gguf for a llama or qwen language model",
        )
    return model.eval()


class _Tower(nn.Module):
    """`get_image_features` and its kin as a forward: pooled and projected embeddings (batch, width)."""

    def __init__(self, model: Any, method: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._method, self._names = model, method, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        found = getattr(self.model, self._method)(**dict(zip(self._names, values, strict=True)))
        return found if isinstance(found, torch.Tensor) else found.pooler_output


class _Whole(nn.Module):
    """The model's own forward with inputs by position, and the named outputs as a tuple."""

    def __init__(self, model: Any, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._names, self._outputs = model, names, outputs

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(**dict(zip(self._names, values, strict=True)), return_dict=True)
        return tuple(found[name] for name in self._outputs)


def _graphs(model: PreTrainedModel) -> list[_Graph]:
    config = getattr(model.config, "text_config", model.config)
    end = getattr(config, "eos_token_id", None)
    end = end if isinstance(end, int) and end < getattr(config, "vocab_size", 0) else None
    text: tuple[_Input, ...] = (
        _Input("input_ids", ("batch", "length"), "ids", last=end),
        _Input("attention_mask", ("batch", "length"), "mask"),
    )
    if not hasattr(model, "get_text_features"):
        inputs = text if model.main_input_name == "input_ids" else (_media_input(model.config, model.main_input_name),)
        return [_whole(model, inputs)]
    media = "audio" if hasattr(model, "get_audio_features") else "image"
    tower = getattr(model.config, f"{'vision' if media == 'image' else media}_config")
    picture = (_media_input(tower, "input_features" if media == "audio" else "pixel_values"),)
    if not _takes_mask(model):
        text = text[:1]
    graphs = []
    for name, inputs, method in ((media, picture, f"get_{media}_features"), ("text", text, "get_text_features")):
        module = _Tower(model, method, tuple(item.name for item in inputs))
        graphs.append(_Graph(name, module.eval(), inputs, (f"{name}_embeds",)))
    # The similarity has a side for each tower: batches of texts and media may differ.
    other = tuple(_Input(item.name, ("media", *item.shape[1:]), item.kind) for item in picture)
    return [*graphs, _whole(model, (*text, *other))]


def _takes_mask(model: Any) -> bool:
    import inspect

    return "attention_mask" in inspect.signature(model.get_text_features).parameters


def _media_input(config: Any, name: str) -> _Input:
    """Shape of what a tower looks at: pixels (batch, channels, height, width), spectrograms, or a waveform."""
    if name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return _Input(name, ("batch", getattr(config, "num_channels", 3), height, width), "float")
    if name == "input_values":
        return _Input(name, ("batch", "samples"), "float")
    if name == "input_features" and hasattr(config, "spec_size"):
        # CLAP folds a spectrogram of up to spec_size * (spec_size / mels) frames into a square.
        frames = config.spec_size * (config.spec_size // config.num_mel_bins)
        return _Input(name, ("batch", 1, frames, config.num_mel_bins), "float")
    raise ExportError(
        f"what shape {name} of a {config.model_type} has is not known",
        where="config.json",
        allowed="pixel_values of one fixed size, input_values (waveforms), CLAP's input_features, input_ids",
        do="trace this model with torch.onnx.export yourself",
    )


def _whole(model: PreTrainedModel, inputs: tuple[_Input, ...]) -> _Graph:
    names = tuple(item.name for item in inputs)
    with torch.no_grad():
        found = model(**dict(zip(names, _example(inputs, seed=0), strict=True)), return_dict=True)
    outputs = tuple(name for name, value in found.items() if isinstance(value, torch.Tensor))
    return _Graph("model", _Whole(model, names, outputs).eval(), inputs, outputs)


def _example(inputs: tuple[_Input, ...], *, seed: int, **sizes: int) -> list[torch.Tensor]:
    """Random inputs; token ids are small enough for any vocabulary, the last row of a mask ends early."""
    sizes = {"batch": 2, "media": 3, "length": 7, "samples": 4000, **sizes}
    generator = torch.Generator().manual_seed(fold(seed, "onnx"))
    values = []
    for item in inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in item.shape)
        if item.kind == "ids":
            ids = torch.randint(3, 50, shape, generator=generator)
            if item.last is not None:
                ids[:, -1] = item.last
                ids[-1, shape[1] // 2 - 1] = item.last  # where the mask ends
            values.append(ids)
        elif item.kind == "mask":
            mask = torch.ones(shape, dtype=torch.int64)
            mask[-1, shape[1] // 2 :] = 0
            values.append(mask)
        else:
            values.append(torch.randn(shape, generator=generator))
    return values


def _write(graph: _Graph, path: Path) -> None:
    shapes = tuple(
        {axis: torch.export.Dim(size) for axis, size in enumerate(item.shape) if isinstance(size, str)}
        for item in graph.inputs
    )
    nbytes = sum(value.numel() * value.element_size() for value in graph.module.state_dict().values())
    try:
        with _quietly():
            torch.onnx.export(
                graph.module,
                tuple(_example(graph.inputs, seed=0)),
                str(path),
                input_names=[item.name for item in graph.inputs],
                output_names=list(graph.outputs),
                dynamic_shapes=(shapes,),
                opset_version=OPSET,
                external_data=nbytes > _LIMIT,
                dynamo=True,
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.OnnxExporterError) as error:
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise ExportError(
            f"torch cannot trace {graph.name}: {lines[0][:300] if lines else type(error).__name__}",
            where=type(graph.module).__name__,
            do="report this with the model's type; the Hugging Face folder (--to hf) still works",
        ) from error


def _check(graph: _Graph, path: Path) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst, relative = 0.0, 0.0
    for seed, sizes in enumerate(({}, {"batch": 3, "media": 1, "length": 11, "samples": 5200}, {"batch": 1})):
        inputs = _example(graph.inputs, seed=seed, **sizes)
        with torch.no_grad():
            want = graph.module(*inputs)
        feeds = {item.name: value.numpy() for item, value in zip(graph.inputs, inputs, strict=True)}
        got = session.run(None, {item.name: feeds[item.name] for item in session.get_inputs()})
        for one, other in zip(want if isinstance(want, tuple) else (want,), got, strict=True):
            if tuple(one.shape) != other.shape:
                raise ExportError(f"{graph.name}: onnxruntime gives {other.shape}, torch {tuple(one.shape)}")
            away = float((one - torch.from_numpy(other)).abs().max())
            worst = max(worst, away)
            relative = max(relative, away / max(float(one.abs().max()), 1e-30))
    if not relative <= TOLERANCE:
        raise ExportError(
            f"{graph.name} in onnxruntime differs from torch by {worst:.3g} ({relative:.3g} of the largest value, "
            f"allowed {TOLERANCE:g})",
            where=path.name,
            do="report this with the model's type; nothing was written",
        )
    return {
        "inputs": {item.name: list(item.shape) for item in graph.inputs},
        "outputs": {value.name: value.shape for value in session.get_outputs()},
        "max_difference": worst,
        "relative": relative,
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals."""
    logger, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
