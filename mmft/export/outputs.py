"""Outputs of the merged folder against those of the adapter model, on real inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from mmft.errors import ExportError
from mmft.export.delta import PLAIN, open_adapter
from mmft.export.merge import Onto, merge_adapter
from mmft.export.names import model_class
from mmft.files import scratch_folder
from mmft.recipe.schema import QuantizationSection

_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_AGREEMENT = 0.999


COUNTED = "counted_positions"
"""Name of a row's mask (batch, length) of the positions whose logits are compared."""


@dataclass(frozen=True)
class Comparison:
    """Logits of two models on the same rows, over the positions that count (labels, else the attention mask)."""

    onto: str
    dtype: str
    positions: int
    max_difference: float  # largest |difference| of a logit
    relative: float  # the same over the largest |logit| of the adapter model
    argmax: float  # share of positions with the same best token
    argmax_beyond_rounding: float  # the same, a tie within the allowed difference counted as equal
    checked: bool  # whether limits were applied, or the numbers only reported


def compare_outputs(
    base_folder: Path,
    adapter_folder: Path,
    merged_folder: Path,
    *,
    rows: Sequence[Mapping[str, torch.Tensor]],
    adapter_model: nn.Module | None,
    dtype: str | None,
    stated: Mapping[str, Any],
    section: QuantizationSection | None,
) -> tuple[Comparison, Comparison | None]:
    """The chosen merge's comparison and, for a quantized base, that of the other choice (merged for it in a temporary
    folder beside `merged_folder`). Raises ExportError when a checked comparison is beyond its limits.
    """
    kind = model_class(base_folder)
    name = dtype or _dtype_of(adapter_model) or stated["dtype"]
    want_type = getattr(torch, name) if name else "auto"
    quantized = section is not None and bool(stated["quantized_modules"])
    if adapter_model is None:
        if quantized:
            raise ExportError(
                "the base was quantized in training: give the trained model as adapter_model",
                where=str(adapter_folder),
                do="verify the run folder (mmft merge RUN), which loads it",
            )
        adapter_model = _adapted(kind.from_pretrained(base_folder, dtype=want_type), adapter_folder)
    trained = list(_logits(adapter_model, rows))
    del adapter_model

    def judge(folder: Path, onto: str) -> Comparison:
        model = kind.from_pretrained(folder, dtype=want_type)
        checked = not quantized or onto == "dequantized"
        # Weights rounded to 16 bits on disk differ by that much in any type, and bitsandbytes computes in its own.
        kept = json.loads((folder / "config.json").read_bytes()).get("dtype") or "float32"
        least = _LIMITS[torch.bfloat16] if quantized else _LIMITS.get(getattr(torch, kept), 0.0)
        return _compare(model, rows, trained, onto=onto, checked=checked, least=least)

    first = judge(merged_folder, stated["onto"])
    second = None
    if quantized:
        other: Onto = "base" if stated["onto"] == "dequantized" else "dequantized"
        with scratch_folder(merged_folder.parent, "verify") as scratch:
            merge_adapter(
                base_folder,
                adapter_folder,
                scratch / "other",
                onto=other,
                quantization=section,
                quantized_modules=stated["quantized_modules"],
                dtype=stated["dtype"],
            )
            second = judge(scratch / "other", other)
    return first, second


def _adapted(model: nn.Module, folder: Path) -> nn.Module:
    """The adapter of a folder on its base; a folder of trained weights goes in by the model's own names."""
    adapter = open_adapter(folder)
    with adapter.weights:
        if adapter.method != PLAIN:
            return PeftModel.from_pretrained(model, str(folder))  # type: ignore[arg-type]
        tensors = {name: adapter.weights.read(name) for name in adapter.weights.entries}
    model.load_state_dict(tensors, strict=False)
    return model


def _dtype_of(model: nn.Module | None) -> str | None:
    """The type that a model's base weights were loaded in, so that the merged model computes in the same."""
    found = getattr(getattr(model, "config", None), "dtype", None)
    return str(found).removeprefix("torch.") if found is not None else None


@torch.no_grad()
def _logits(model: nn.Module, rows: Sequence[Mapping[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Per row batch, the logits (positions, vocabulary) of the positions that count, float32 on the CPU."""
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        for row in rows:
            inputs = {name: value.to(device) for name, value in row.items() if name not in ("labels", COUNTED)}
            logits = model(**inputs).logits.float().cpu()
            chosen = _counting(row)
            # A picture's states may stand before those of the tokens.
            yield logits[:, logits.shape[1] - chosen.shape[1] :][chosen]
    finally:
        model.train(was_training)


def _counting(row: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which positions (batch, length) count: those `COUNTED` marks, those that predict a supervised label, else all
    that are not padding."""
    if COUNTED in row:
        return row[COUNTED]
    if "labels" in row:
        chosen = torch.zeros_like(row["labels"], dtype=torch.bool)
        chosen[:, :-1] = row["labels"][:, 1:] != -100
        return chosen
    mask = row.get("attention_mask")
    return torch.ones_like(row["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _compare(
    model: nn.Module,
    rows: Sequence[Mapping[str, torch.Tensor]],
    trained: Sequence[torch.Tensor],
    *,
    onto: str,
    checked: bool,
    least: float,
) -> Comparison:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    limit = max(_LIMITS.get(dtype, 1e-5), least)
    largest = max((float(logits.abs().max()) for logits in trained if logits.numel()), default=0.0)
    positions, difference, same, near = 0, 0.0, 0, 0
    for want, got in zip(trained, _logits(model, rows), strict=True):
        if not want.numel():
            continue
        if not (torch.isfinite(want).all() and torch.isfinite(got).all()):
            raise ExportError("a model's logits are not finite", do="look at the run's loss")
        positions += want.shape[0]
        difference = max(difference, float((got - want).abs().max()))
        best, choice = want.max(dim=-1), got.argmax(dim=-1)
        same += int((best.indices == choice).sum())
        gap = best.values - want.gather(-1, choice[:, None])[:, 0]
        near += int((gap <= 2 * limit * largest).sum())
    if not positions:
        raise ExportError("the rows have no position to compare", do="give rows with supervised labels")
    found = Comparison(
        onto=onto,
        dtype=str(dtype).removeprefix("torch."),
        positions=positions,
        max_difference=difference,
        relative=difference / largest if largest else 0.0,
        argmax=same / positions,
        argmax_beyond_rounding=near / positions,
        checked=checked,
    )
    if checked and not (found.relative <= limit and found.argmax_beyond_rounding >= _AGREEMENT):
        raise ExportError(
            f"the merged model's outputs differ from the adapter model's: {found.relative:.3g} of the largest logit "
            f"(allowed {limit:g}), the same best token at {found.argmax_beyond_rounding:.2%} of {positions} positions "
            f"(needed {_AGREEMENT:.1%})",
            do="look at the merge report; give the adapter model in the merge's own dtype",
        )
    return found
