"""Several LoRA adapters of one base become one adapter folder, module by module, without the base.

The result is plain LoRA with scaling one in every module (`alpha = r`, patterns where ranks differ): it loads in
peft, and `mmft merge` merges it. A module that some adapters do not have counts as zero there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.folder import SIDECAR, read_sidecar
from mmft.adapters.lorafile import LoraFolder, open_lora, write_lora
from mmft.adapters.mixing import METHODS, PRUNING, RANKED, Factors, Mixed, inner, mix
from mmft.backbones.fingerprint import digest
from mmft.errors import AdapterError, RecipeError, choices
from mmft.files import atomic_folder, remove_stale, write_json
from mmft.seeds import fold

REPORT = "combine_report.json"


@dataclass(frozen=True)
class Source:
    """One adapter that went in: its largest rank, and the Frobenius norm of all its deltas without the weight."""

    folder: str
    weight: float
    modules: int
    rank: int
    norm: float


@dataclass(frozen=True)
class CombineReport:
    """What came out. Norms are Frobenius norms over all modules.

    `difference` is `|result - sum w_i d_i| / |sum w_i d_i|`: 0 for `cat`, the loss of truncation for `svd`, and for
    the others how far the method means to be from the plain sum. `cosine` holds `<d_i, d_j> / |d_i| |d_j|` for each
    pair, `sign_conflicts` (TIES) the share of values that two or more adapters keep with different signs.
    """

    method: str
    density: float | None
    rank: int
    seed: int
    folder: str
    adapters: tuple[Source, ...]
    modules: int
    parameters: int
    norm: float
    difference: float
    cosine: tuple[tuple[float, ...], ...]
    sign_conflicts: float | None
    kept: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in combine_report.json."""
        return json.loads(json.dumps(asdict(self)))


def combine_adapters(
    folders: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> CombineReport:
    """Write the combination of `folders` to `out`, complete or not at all. See `mixing` for the methods.

    Without weights every adapter gets 1 / n. `rank` (for `*svd`) is the largest rank in the inputs if not given.
    DARE draws per module from `fold(seed, "dare", module)`. Raises RecipeError for a bad choice, AdapterError for
    adapters of different bases or methods, other kinds than plain LoRA, ranks a method cannot combine, and values
    that are not finite.
    """
    shares = _check(folders, weights=weights, method=method, density=density, rank=rank)
    if out.exists() or out.is_symlink():
        raise AdapterError(f"{out.name} exists already", where=str(out), do="delete it, or write to another folder")
    opened = [open_lora(folder) for folder in folders]
    _same_base(opened)
    modules = sorted({name for item in opened for name in item.modules})
    _check_shapes(opened, modules, method)
    kept = _kept(opened)
    largest = rank or max(item.rank for item in opened)
    sizes = _Sizes(len(opened))

    def produce(name: str) -> Mixed:
        held = [number for number, item in enumerate(opened) if name in item.modules]
        given = [opened[number].factors(name, shares[number]) for number in held]
        source = torch.Generator().manual_seed(fold(seed, "dare", name))
        mixed = mix(given, method, density=density, rank=largest, generator=source)
        sizes.add(dict(zip(held, given, strict=True)), mixed)
        return mixed

    remove_stale(out.parent)
    with atomic_folder(out) as folder:
        ranks = write_lora(folder, opened, {name: _lazy(produce, name) for name in modules}, kept=kept)
        report = CombineReport(
            method=method,
            density=density if method in PRUNING else None,
            rank=max(ranks.values()),
            seed=seed,
            folder=str(out),
            adapters=tuple(
                Source(str(item.folder), share, len(item.modules), item.rank, sizes.norm(number))
                for number, (item, share) in enumerate(zip(opened, shares, strict=True))
            ),
            modules=len(modules),
            parameters=sizes.parameters,
            norm=math.sqrt(max(0.0, sizes.result)),
            difference=sizes.difference(shares),
            cosine=sizes.cosine(),
            sign_conflicts=(sizes.conflicts / max(1, sizes.twice)) if "ties" in method else None,
            kept=tuple(sorted(kept)),
        )
        _write_sidecar(folder, opened, report)
        write_json(folder / REPORT, report.to_json())
    return report


def read_weights(text: str) -> list[float]:
    """`0.7,0.3` as numbers. Raises RecipeError for anything else."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise RecipeError(
            f"weights {text!r} are not numbers", where="--weights", do="give for example --weights 0.7,0.3"
        ) from error


def _lazy(produce: Callable[[str], Mixed], name: str) -> Callable[[], Mixed]:
    return lambda: produce(name)


class _Sizes:
    """Inner products of the adapters, of the result, and between them, summed over modules in float64."""

    def __init__(self, count: int) -> None:
        self.pairs = [[0.0] * count for _ in range(count)]
        self.across = [0.0] * count
        self.result = 0.0
        self.parameters = self.conflicts = self.twice = 0

    def add(self, given: dict[int, Factors], mixed: Mixed) -> None:
        result = Factors(mixed.a, mixed.b, 1.0, 1.0)
        for i, left in given.items():
            for j, right in given.items():
                self.pairs[i][j] += inner(left, right)
            self.across[i] += inner(left, result)
        self.result += inner(result, result)
        self.parameters += mixed.a.numel() + mixed.b.numel()
        self.conflicts += mixed.conflicts
        self.twice += mixed.kept_twice

    def norm(self, number: int) -> float:
        return math.sqrt(max(0.0, self.pairs[number][number]))

    def cosine(self) -> tuple[tuple[float, ...], ...]:
        norms = [self.norm(number) or 1.0 for number in range(len(self.pairs))]
        return tuple(
            tuple(value / (norms[i] * norms[j]) for j, value in enumerate(row)) for i, row in enumerate(self.pairs)
        )

    def difference(self, weights: Sequence[float]) -> float:
        """Of differences of squares: below 1e-6 it is rounding, and called zero."""
        total = sum(wi * wj * self.pairs[i][j] for i, wi in enumerate(weights) for j, wj in enumerate(weights))
        cross = sum(weight * value for weight, value in zip(weights, self.across, strict=True))
        squared = self.result - 2.0 * cross + total
        found = math.sqrt(max(0.0, squared) / total) if total > 0 else float(self.result > 0)
        return found if found > 1e-6 else 0.0


def _check(
    folders: Sequence[Path],
    *,
    weights: Sequence[float] | None,
    method: str,
    density: float | None,
    rank: int | None,
) -> list[float]:
    """The weights. Raises RecipeError for what a command line can get wrong."""
    if not folders:
        raise RecipeError("no adapters to combine", where="ADAPTERS", do="give two or more adapter folders")
    if method not in METHODS:
        raise RecipeError(
            f"method {method!r} is unknown",
            where="--method",
            allowed=choices(METHODS, word=method),
            do="choose one of them",
        )
    if (method in PRUNING) != (density is not None) or (density is not None and not 0.0 < density <= 1.0):
        needs = "needs the share of values it keeps" if method in PRUNING else "keeps all values and takes no density"
        raise RecipeError(
            f"method {method} {needs}, density is {density}",
            where="--density",
            allowed="above 0, up to 1, for " + ", ".join(PRUNING),
            do="give --density 0.5" if method in PRUNING else "leave --density out",
        )
    if rank is not None and (method not in RANKED or rank < 1):
        raise RecipeError(
            f"method {method} takes no rank {rank}",
            where="--rank",
            allowed="1 or more, for " + ", ".join(RANKED),
            do="leave --rank out, or use --method svd",
        )
    shares = [1.0 / len(folders)] * len(folders) if weights is None else [float(value) for value in weights]
    if len(shares) != len(folders) or not all(map(math.isfinite, shares)) or not any(shares):
        raise RecipeError(
            f"{len(shares)} weights ({', '.join(map(str, shares))}) for {len(folders)} adapters",
            where="--weights",
            allowed="one finite number for each adapter, not all of them zero; they need not add up to 1",
            do="give for example --weights 0.7,0.3",
        )
    return shares


def _same_base(opened: Sequence[LoraFolder]) -> None:
    """Fingerprints where mmft left one, names elsewhere."""
    prints: dict[str, Path] = {}
    names: dict[str, Path] = {}
    sidecars = [read_sidecar(item.folder) for item in opened]
    for item, sidecar in zip(opened, sidecars, strict=True):
        if sidecar is not None:
            prints.setdefault(digest(sidecar["base_fingerprint"]), item.folder)
        name = (sidecar or {}).get("base_name") or item.base
        if name and not all(sidecars):  # with a fingerprint each, the name does not matter
            local = Path(name)
            names.setdefault(str(local.resolve()) if local.exists() else name, item.folder)
    for found, what in ((prints, "digest"), (names, "base")):
        if len(found) > 1:
            told = "; ".join(f"{folder.name}: {what} {key[:60]}" for key, folder in found.items())
            raise AdapterError(
                f"the adapters belong to {len(found)} different bases: {told}",
                where=", ".join(str(item.folder) for item in opened),
                allowed="adapters that were trained on the same base (same files)",
                do="train them on one base, or merge each into its own",
            )


def _check_shapes(opened: Sequence[LoraFolder], modules: Sequence[str], method: str) -> None:
    for name in modules:
        held = [item for item in opened if name in item.modules]
        shapes = {(item.modules[name].a_shape[1:], item.modules[name].b_shape[0]) for item in held}
        ranks = {item.modules[name].a_shape[0] for item in held}
        kinds = {item.modules[name].embedding for item in held}
        if len(shapes) > 1 or len(kinds) > 1:
            raise AdapterError(
                f"{name} has different shapes in the adapters: {sorted(shapes)}",
                where=", ".join(str(item.folder) for item in held),
                do="combine adapters of the same base",
            )
        if len(ranks) > 1 and method not in ("cat", *RANKED):
            raise AdapterError(
                f"{name} has ranks {', '.join(map(str, sorted(ranks)))}: method {method} adds A to A and B to B, "
                "which must have one rank",
                where=", ".join(str(item.folder) for item in held),
                allowed=", ".join(("cat", *RANKED)),
                do=f"use --method {method}_svd" if f"{method}_svd" in METHODS else "use --method svd",
            )


def _kept(opened: Sequence[LoraFolder]) -> dict[str, LoraFolder]:
    """Whole tensors (`modules_to_save`) -> the adapter they come from; two different ones have no combination."""
    found: dict[str, LoraFolder] = {}
    for item in opened:
        for name in item.whole:
            other = found.setdefault(name, item)
            if other is not item and not torch.equal(other.read(name), item.read(name)):
                raise AdapterError(
                    f"{name} was trained whole in {other.folder.name} and in {item.folder.name}, with different values",
                    where=str(item.folder),
                    allowed="whole modules (modules_to_save, mode: full) that only one adapter has, or equal ones",
                    do="train these adapters with LoRA on that module",
                )
    return found


def _write_sidecar(folder: Path, opened: Sequence[LoraFolder], report: CombineReport) -> None:
    sidecars = [found for item in opened if (found := read_sidecar(item.folder)) is not None]
    if not sidecars:
        return
    targets = [target for found in sidecars for target in found.get("targets", [])]
    unique = [target for number, target in enumerate(targets) if target not in targets[:number]]
    recipes = Counter(str(found.get("recipe_digest", "")) for found in sidecars)
    write_json(
        folder / SIDECAR,
        {
            **sidecars[0],
            "recipe_digest": next(iter(recipes)) if len(recipes) == 1 else "",
            "targets": unique,
            "combined": {"method": report.method, "adapters": [asdict(source) for source in report.adapters]},
        },
    )
