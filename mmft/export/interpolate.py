"""Weight interpolation of base and tuned model (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).

    interpolate_models(base, merged, out, alpha=0.5)

Every tensor of `out` is W = (1 - alpha) W_base + alpha W_tuned, computed in float32 (float64 for float64 weights) and
rounded once to the tuned model's type. For LoRA that is the adapter at alpha times its scale, for a part that was
trained whole the straight line between both; it holds for every method, because it is done on merged weights.
Weights that training left alone keep their bytes. Read and written in blocks: a few MB of memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from mmft.errors import ExportError
from mmft.export.shards import Output, Weights, as_bytes, parse_size, plan_shards, row_blocks, weight_files
from mmft.export.sidefiles import copy_files
from mmft.export.writer import hashed_folder, write_shards
from mmft.files import require_free


def interpolate(base: torch.Tensor, tuned: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - alpha) base + alpha tuned in the tuned tensor's type; at 0 and 1 one of the two without arithmetic."""
    if alpha in (0.0, 1.0) or not tuned.is_floating_point():
        return (tuned if alpha else base).to(tuned.dtype)
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    start = base.to(wide)
    # As a step from the base, so that weights which are equal stay what they are.
    return (start + alpha * (tuned.to(wide) - start)).to(tuned.dtype)


def interpolate_models(
    base: str | Path, tuned: str | Path, out: str | Path, *, alpha: float, max_shard_size: str | int = "5GB"
) -> Path:
    """Write the model between the folders `base` and `tuned` to `out`, with the tuned folder's config and processor.

    Raises ExportError when alpha is not in [0, 1], or the folders hold other tensors (a quantized base, a changed
    vocabulary).
    """
    if not 0.0 <= alpha <= 1.0:
        raise ExportError(f"alpha is {alpha}", allowed="0 (the base) to 1 (the tuned model)", do="give a share")
    target = Path(out)
    with Weights(weight_files(Path(base))) as one, Weights(weight_files(Path(tuned))) as other:
        _check_same(one, other, where=f"{base}, {tuned}")
        outputs = [Output(entry.name, entry.dtype, entry.shape) for entry in other.entries.values()]
        require_free(target, sum(output.nbytes for output in outputs) + (64 << 20), what=f"the model {target.name}")

        def pieces(output: Output) -> Iterator[memoryview]:
            entry = other.entries[output.name]
            if not entry.shape:
                yield as_bytes(interpolate(one.read(output.name), other.read(output.name), alpha))
                return
            for start, stop in row_blocks(entry):
                first, last = one.read(output.name, start, stop), other.read(output.name, start, stop)
                yield as_bytes(interpolate(first, last, alpha))

        shards = plan_shards(outputs, parse_size(max_shard_size))
        with hashed_folder(target) as (folder, known):
            known.update(write_shards(folder, shards, pieces))
            copy_files(Path(tuned), folder)
            shutil.copyfile(Path(tuned) / "config.json", folder / "config.json")
    return target


def between(base: nn.Module, tuned: nn.Module, alphas: Iterable[float]) -> Iterator[float]:
    """Bring the loaded model `tuned` to each alpha in turn, in place, and to 1 in the end; yields the alpha.

    Price: the tuned weights a second time in memory. Both models must be of one class, unquantized.
    """
    first, own = base.state_dict(), tuned.state_dict()
    if first.keys() != own.keys():
        raise ExportError(
            f"base and tuned model do not hold the same tensors: {', '.join(sorted(first.keys() ^ own.keys())[:3])}",
            where="export.interpolate",
            do="take export.interpolate out",
        )
    last = {name: value.clone() for name, value in own.items()}
    for alpha in (*alphas, 1.0):
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(interpolate(first[name], last[name], alpha))
        if alpha != 1.0:
            yield alpha


def _check_same(one: Weights, other: Weights, *, where: str) -> None:
    shapes = [{entry.name: entry.shape for entry in weights.entries.values()} for weights in (one, other)]
    differing = sorted({name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items())})
    if differing:
        raise ExportError(
            f"base and tuned model do not hold the same tensors: {', '.join(differing[:3])}",
            where=where,
            allowed="two folders of one architecture, neither of them quantized",
            do="merge onto the base's own weights (export.merge_onto: base)",
        )
