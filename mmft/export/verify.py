"""The proof of a merge made by any tool: untouched bytes, recomputed updates, equal outputs.

All that is wrong with a merged folder is named at once, in an ExportError; how tensors are compared stands in
`prover.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmft.errors import CheckpointError, ExportError
from mmft.export.delta import open_adapter, resolve_updates
from mmft.export.merge import REPORT, Onto, quantized_names
from mmft.export.names import map_names, meta_model
from mmft.export.outputs import Comparison, compare_outputs
from mmft.export.prover import Prover
from mmft.export.runtime import Runtime
from mmft.export.shards import Weights, weight_files
from mmft.files import MANIFEST, verify_folder
from mmft.recipe.schema import QuantizationSection

_FOREIGN: dict[str, Any] = {"onto": "base", "dtype": None, "quantization": None, "quantized_modules": []}


@dataclass(frozen=True)
class VerifyReport:
    """What was proved. `worst` is the largest deviation of a touched value, in units of what rounding allows."""

    merged: str
    onto: Onto
    bound: str  # what a touched value may be off by
    untouched: int
    untouched_bytes: int
    untouched_sha256: str
    touched: int
    worst: float
    worst_tensor: str | None
    left_out: tuple[str, ...]  # tensors of the base that no module uses and the merged folder does not have
    outputs: Comparison | None
    outputs_other_base: Comparison | None  # a quantized base only: the merge that was not chosen

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def verify_merge(
    base_folder: Path,
    adapter_folder: Path,
    merged_folder: Path,
    *,
    rows: Sequence[Mapping[str, torch.Tensor]] = (),
    adapter_model: nn.Module | None = None,
    dtype: str | None = None,
) -> VerifyReport:
    """Prove that `merged_folder` is base plus adapter, whatever tool wrote it, in any layout of names, shards or ties.

    A folder of mmft's own has a manifest, which must hold, and a merge_report.json, which says what was quantized.
    A folder of another tool is taken as merged onto the base's 16 or 32 bit weights, in the type it is stored in.
    `rows` are model inputs (each a batch; `labels`, if there, select the positions that count). `adapter_model` is
    the trained model, quantized if training was; without it, base and adapter are loaded as peft does, in `dtype`.
    With a quantized base, the outputs are checked for a merge onto the dequantized weights and reported for one onto
    the original weights. Price: two reads of both folders, and both models in memory while outputs are compared.
    """
    base_folder, adapter_folder, merged_folder = Path(base_folder), Path(adapter_folder), Path(merged_folder)
    stated = _stated(merged_folder)
    section = QuantizationSection(**stated["quantization"]) if stated["quantization"] else None
    adapter = open_adapter(adapter_folder)
    with (
        adapter.weights,
        Weights(weight_files(base_folder)) as base,
        Weights(weight_files(merged_folder)) as merged,
    ):
        names = map_names(meta_model(base_folder), base.entries)
        updates = resolve_updates(adapter, names)
        prover = Prover(
            Runtime(base, names),
            Runtime(merged, map_names(meta_model(merged_folder), merged.entries)),
            adapter,
            updates=updates,
            quantized=quantized_names(names, stated["quantized_modules"], updates),
            section=section,
            onto=stated["onto"],
            dtype=getattr(torch, stated["dtype"]) if stated["dtype"] else None,
            own=stated is not _FOREIGN,
        )
        prover.run()
    outputs = other = None
    if rows:
        outputs, other = compare_outputs(
            base_folder,
            adapter_folder,
            merged_folder,
            rows=rows,
            adapter_model=adapter_model,
            dtype=dtype,
            stated=stated,
            section=section,
        )
    return VerifyReport(
        merged=str(merged_folder),
        onto=stated["onto"],
        bound=prover.bound,
        untouched=prover.untouched,
        untouched_bytes=prover.untouched_bytes,
        untouched_sha256=prover.digest.hexdigest(),
        touched=prover.touched,
        worst=prover.worst,
        worst_tensor=prover.worst_tensor,
        left_out=tuple(prover.left_out),
        outputs=outputs,
        outputs_other_base=other,
    )


def _stated(folder: Path) -> Mapping[str, Any]:
    """What the merge says of itself; of another tool's folder nothing."""
    try:
        if (folder / MANIFEST).exists():
            verify_folder(folder)
        elif not (folder / REPORT).exists():
            return _FOREIGN
        stated = json.loads((folder / REPORT).read_bytes())
        return {name: stated[name] for name in _FOREIGN}
    except (CheckpointError, OSError, ValueError, KeyError) as error:
        raise ExportError(f"the merged folder is damaged: {error}", where=str(folder), do="merge again") from error
