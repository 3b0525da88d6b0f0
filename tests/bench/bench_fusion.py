"""Every fusion strategy and every modality alone, trained on the same rows by the engine: one table.

    python tests/bench/bench_fusion.py [--seeds 5] [--only NAME ...] [recipe] [key=value ...]

The rows, encoders and training are those of recipes/fusion_emoji.yaml; the encoders are frozen and their tokens
computed once. An interval is a 95 % percentile bootstrap over seeds and emoji (the two drawings of one emoji are
drawn together). The last columns: what is lost when a modality is missing at test time, which modality dropout is for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmft.adapters.build import Adapted, build_adapters
from mmft.backbones.load import Backbone
from mmft.backbones.parts import find_parts
from mmft.data.formats import load_many
from mmft.data.fused import FusedRenderer
from mmft.fusion import FusionModel, FusionProcessor
from mmft.fusion.heads import decide
from mmft.fusion.store import FeatureStore
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.kinds.base import Datasets
from mmft.kinds.fusion_base import build, fusion_config
from mmft.kinds.fusion_store import stored_features
from mmft.objectives.classification import ClassificationObjective
from mmft.recipe.load import load_recipe
from mmft.runfolder import RunFolder
from mmft.seeds import fold
from mmft.stages import make_accelerator, train_stage

ROOT = Path(__file__).resolve().parents[2]
STRATEGIES = {
    name: [f"objective.strategy={name}"]
    for name in (
        "late_average",
        "late_learned",
        "late_stacking",
        "weighted",
        "gated",
        "low_rank",
        "early",
        "hybrid",
        "cross_attention",
    )
}
NO_DROP = "objective.modality_dropout=0"
ALONE = {"pooled": ["objective.strategy=weighted", NO_DROP], "transformer": ["objective.strategy=early", NO_DROP]}


class Bench:
    """The rows, encoders and stored tokens that all trainings share."""

    def __init__(self, recipe: Any, folder: Path) -> None:
        self.folder, self.kind, self.accelerator = folder, kind_of(recipe), make_accelerator(recipe.train)
        wanted = self.kind.formats
        trained = load_many(recipe.data.train, recipe.data, 0, wanted=wanted)
        columns = trained[0].columns
        self.train = [sample for one in trained for sample in one.samples]
        held = load_many(recipe.data.eval, recipe.data, 0, wanted=wanted, columns=columns)
        self.test = [sample for one in held for sample in one.samples]
        config = fusion_config(recipe, self.train)
        model, self.processor = build(config, self.train, recipe.model, max_length=recipe.data.max_length)
        self.encoders = {name: (one.kind, one.tower) for name, one in model.encoders.items()}
        self.renderer = self._renderer(recipe, config, self.processor)
        model.requires_grad_(False)
        adapted = Adapted(model.eval(), None, (), "full", ())  # type: ignore[arg-type]
        stored_features(recipe, adapted, self._datasets(self.train, self.renderer), self.renderer)

    def _datasets(self, train: list[Any], renderer: FusedRenderer) -> Datasets:
        return Datasets(train, {"test": self.test}, renderer, "bench")

    def _renderer(self, recipe: Any, config: Any, processor: FusionProcessor) -> FusedRenderer:
        return FusedRenderer(processor, max_length=recipe.data.max_length)

    def run(self, recipe: Any, names: tuple[str, ...]) -> dict[str, Any]:
        """Per-row results of one training with the modalities `names`: all there, and with each missing."""
        config, seed = fusion_config(recipe, self.train), recipe.train.seed
        processor = FusionProcessor(
            {name: self.processor.parts[name] for name in names},
            self.processor.table,
            task=config.task,
            classes=self.processor.classes,
        )
        torch.manual_seed(fold(seed, "fusion", "start"))
        model = FusionModel.from_encoders(config, {name: self.encoders[name] for name in names})
        backbone = Backbone(model, processor, find_parts(model), None, "bench", None, False)
        adapted = build_adapters(backbone, recipe.adapter, seed=seed)
        renderer = self._renderer(recipe, config, processor)
        store = self.renderer.store
        assert isinstance(store, FeatureStore)
        renderer.use(FeatureStore(store.path, {name: store.ends[name] for name in names}), self._order())
        datasets = self._datasets(self.kind.balanced(recipe, self.train), renderer)
        run = RunFolder(self.folder / f"{recipe.name}-{time.monotonic_ns()}", recipe, Journal(None, quiet=True))
        run.path.mkdir()
        begin = time.process_time()
        # The kind's objective would look for stored tokens of just these rows; all rows have theirs already.
        train_stage(run, adapted, datasets, self.accelerator, resume=False, factory=own_loss)
        self.kind.settle(recipe, adapted, datasets)
        seconds = time.process_time() - begin
        truth = renderer.targets(self.test)
        found = {"all": self._right(adapted.model, renderer, truth, frozenset(names))}
        if len(names) > 1:
            for name in names:
                found[name] = self._right(adapted.model, renderer, truth, frozenset(names) - {name})
        return {"right": found, "seconds": seconds}

    def _order(self) -> list[Any]:
        return list({(one.source, one.id): one for one in (*self.train, *self.test)}.values())

    @torch.no_grad()
    def _right(self, model: Any, renderer: FusedRenderer, truth: torch.Tensor, names: frozenset[str]) -> list[int]:
        model.eval()
        right: list[int] = []
        for start in range(0, len(self.test), 128):
            batch = renderer.inputs(self.test[start : start + 128])
            batch["present"] = {name: there & (name in names) for name, there in batch["present"].items()}
            answers = decide(model.config, model(**batch).logits)
            right += (answers == truth[start : start + 128]).int().tolist()
        return right


def own_loss(model: Any, recipe: Any) -> ClassificationObjective:
    """The objective of a fusion run."""
    return ClassificationObjective(model)


def interval(rows: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean and 95 % interval of (seeds, rows) of 0 and 1: seeds and pairs of rows drawn with replacement."""
    pairs = rows.reshape(len(rows), -1, 2).mean(axis=2) if rows.shape[1] % 2 == 0 else rows
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for at in range(resamples):
        seeds = rng.integers(0, len(pairs), len(pairs))
        columns = rng.integers(0, pairs.shape[1], pairs.shape[1])
        draws[at] = pairs[seeds].mean(axis=0)[columns].mean()
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(rows.mean()), float(low), float(high)


def show(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table as Markdown."""
    lines = ["| trained | accuracy | 95 % interval | by seed | loses without each modality | seconds |"]
    lines.append("|---|---|---|---|---|---|")
    for name, runs in results.items():
        rows = np.array([run["right"]["all"] for run in runs], dtype=float)
        value, low, high = interval(rows)
        seeds = " ".join(f"{one:.3f}" for one in rows.mean(axis=1))
        lost = []
        for modality in runs[0]["right"]:
            if modality != "all":
                without = np.array([run["right"][modality] for run in runs], dtype=float)
                loss, a, b = interval(rows - without)
                lost.append(f"{modality} {loss:.3f} [{a:.3f}, {b:.3f}]")
        seconds = np.mean([run["seconds"] for run in runs])
        lines.append(
            f"| {name} | {value:.3f} | [{low:.3f}, {high:.3f}] | {seeds} | {', '.join(lost)} | {seconds:.0f} |"
        )
    return lines


def main() -> None:
    """Train everything and print the table; partial results are kept in `--keep`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "fusion_emoji.yaml"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--keep", type=Path, default=None, help="JSON file of results to go on from")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    base = load_recipe(given.recipe, given.overrides)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(base, Path(folder))
        everything = tuple(bench.encoders)
        jobs = {f"{name} alone, {how}": (fields, (name,)) for name in everything for how, fields in ALONE.items()}
        jobs |= {name: ([*fields, NO_DROP], everything) for name, fields in STRATEGIES.items()}
        jobs |= {f"{name}, modality dropout": (STRATEGIES[name], everything) for name in ("late_learned", "gated")}
        results: dict[str, list[dict[str, Any]]] = (
            json.loads(given.keep.read_text()) if given.keep and given.keep.is_file() else {}
        )
        for seed in range(given.seeds):
            for name, (fields, names) in jobs.items():
                if (given.only and name not in given.only) or len(results.get(name, [])) > seed:
                    continue
                recipe = load_recipe(given.recipe, [*given.overrides, *fields, f"train.seed={seed}"])
                results.setdefault(name, []).append(bench.run(recipe, names))
                if given.keep:
                    given.keep.write_text(json.dumps(results))
    print("\n".join(show(results)))


if __name__ == "__main__":
    main()
