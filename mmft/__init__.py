"""mmft: parameter-efficient fine-tuning of multimodal models.

The verbs of the command line as functions. Importing mmft imports no torch; a verb imports what it needs.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "build_data",
    "check",
    "combine",
    "convert",
    "evaluate",
    "export_model",
    "generate",
    "inspect",
    "merge",
    "plan",
    "preview",
    "push",
    "report",
    "stats",
    "trace",
    "train",
    "validate",
    "verify",
    "verify_fast",
]


def __getattr__(name: str) -> Any:
    """`mmft.fit` (tables, texts, pictures and sounds in one classifier), imported when it is asked for."""
    if name == "fit":
        from mmft.fitting import fit

        return fit
    raise AttributeError(f"module 'mmft' has no attribute {name!r}")


RecipeLike = str | Path | Mapping[str, Any]


def validate(recipe: RecipeLike, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved recipe as plain values. Raises RecipeError with all that is wrong at once."""
    from mmft.recipe.load import load_recipe

    return load_recipe(recipe, overrides).model_dump(mode="json")


def train(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    objective: Any = None,
    rewards: Sequence[Any] = (),
    fetch: Any = None,
) -> dict[str, Any]:
    """Run a recipe to its end (train, save, merge, verify, evaluate, report) and return `report.json` as values.

    `objective`: a loss of your own in the place of the recipe's, as `FILE.py:NAME` or as a class or function that
    takes (model, recipe). `rewards`: functions of one sampled answer in the place of `objective.rewards`, likewise.
    `fetch`: what brings the shards of streamed sets that lie elsewhere, a function of (url, path) or `FILE.py:NAME`.
    """
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.run import train as run

    return run(
        recipe,
        overrides,
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
        objective=objective,
        rewards=rewards,
        fetch=fetch,
    )


def evaluate(run: str | Path, *, fetch: Any = None, quiet: bool = False) -> dict[str, Any]:
    """Answer the evaluation rows of a run again, rewrite its report and return it; `fetch` as in `train`."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.run import evaluate as again

    return again(run, fetch=fetch, quiet=quiet)


def report(run: str | Path) -> Path:
    """Write `report.html` of a run again, from the files of the run folder alone."""
    from mmft.evaluation.report import rebuild_report

    return rebuild_report(Path(run))


def generate(
    model: str | Path,
    *,
    question: str,
    image: str | Path | None = None,
    which: str | None = None,
    base: str | None = None,
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """Answer one question about one image from a run folder, an adapter folder, a model folder or a hub id."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.answer import answer

    return answer(model, question=question, image=image, which=which, base=base, max_new_tokens=max_new_tokens)


def inspect(
    model: str | None,
    *,
    revision: str | None = None,
    targets: Sequence[str] = (),
    layers: str | None = None,
    exclude: Sequence[str] = (),
    adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Parts, parameters and linear layers of a model (and of an adapter of it), without reading its weights.

    `targets`, `layers` (`last:8`) and `exclude` show what an adapter with these settings would sit on. With an adapter
    folder and no model, the base that the adapter names is taken.
    """
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    importlib.import_module("mmft.fusion")  # transformers knows fusion models from then on
    from mmft.backbones.inspect import inspect_model

    return inspect_model(model, revision, tuple(targets), layers=layers, exclude=tuple(exclude), adapter=adapter)


def check(
    data: RecipeLike | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    against: Sequence[str | Path] = (),
    model: str | None = None,
    max_length: int | None = None,
    allow: Sequence[str] = (),
    fix: str | Path | None = None,
    out: str | Path = "bad_rows.jsonl",
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Open every row of a recipe's sets or of data files before training; what is wrong with which row, by cause."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.checking import check as run

    options: dict[str, Any] = {"against": against, "model": model, "max_length": max_length, "allow": allow}
    return run(data, overrides, fix=fix, out=out, workers=workers, quiet=quiet, **options)


def convert(
    data: str | Path, out: str | Path, *, to: str, media_root: str | Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Write a data set as `messages`, `llava`, `parquet` or `webdataset`, with its media."""
    from mmft.converting import convert as run

    return run(data, out, to=to, media_root=media_root, quiet=quiet)


def stats(
    data: str | Path,
    *,
    model: str | None = None,
    media_root: str | Path | None = None,
    limit: int = 2000,
    html: str | Path | None = None,
) -> dict[str, Any]:
    """What a data set holds: rows, media, sizes, lengths, answers, classes; with `html` also a page of plots."""
    from mmft.converting import stats as run

    return run(data, model=model, media_root=media_root, limit=limit, html=html)


def plan(recipe: RecipeLike, overrides: Sequence[str] = (), *, probe: bool = False) -> dict[str, Any]:
    """What a recipe would do: parts, trainable counts, rows, lengths, steps, memory. Nothing is trained. `probe` loads
    the model and measures the memory of one step on the largest forward."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.planning import make_plan

    values = make_plan(recipe, overrides)
    if probe:
        from mmft.probing import probe_memory
        from mmft.recipe.load import load_recipe

        values["probe"] = probe_memory(load_recipe(recipe, overrides))
    return values


def verify_fast(recipe: RecipeLike, overrides: Sequence[str] = (), *, batches: int = 4) -> dict[str, Any]:
    """Replay real steps of a recipe on the plain and on the fast path: differences of loss and gradients, seconds."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.replay import verify_fast as replay

    return replay(recipe, overrides, batches=batches)


def preview(recipe: RecipeLike, overrides: Sequence[str] = (), *, rows: int = 8, out: str | Path | None = None) -> Path:
    """Write an HTML page that shows rows as the model gets them, trained tokens coloured; returns its path."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.planning import write_recipe_preview

    return write_recipe_preview(recipe, overrides, rows=rows, out=out)


def trace(recipe: RecipeLike, overrides: Sequence[str] = (), *, row: int = 0) -> list[dict[str, Any]]:
    """Walk one row through every station and return type, shape, digest and source line of each."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.tracing import trace_row

    return trace_row(recipe, overrides, row=row)


def merge(
    adapter: str | Path,
    *,
    base: str | None = None,
    out: str | Path | None = None,
    onto: str | None = None,
    fetch: Any = None,
) -> dict[str, Any]:
    """Merge an adapter (or a run's; `fetch` as in `train`) into its base, tensor by tensor; returns the report."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.prove import merge_folder

    return merge_folder(adapter, base=base, out=out, onto=onto, fetch=fetch)


def verify(base: str, adapter: str | Path, merged: str | Path) -> dict[str, Any]:
    """Prove that `merged` is `base` plus `adapter`; raises ExportError when it is not."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.prove import verify_folder_merge

    return verify_folder_merge(base, adapter, merged)


def combine(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | str | None = None,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Make one LoRA adapter folder of several of one base (peft's methods, streamed); returns the report."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.adapters.combine import combine_adapters, read_weights

    shares = read_weights(weights) if isinstance(weights, str) else weights
    folders = [Path(folder) for folder in adapters]
    found = combine_adapters(folders, Path(out), weights=shares, method=method, density=density, rank=rank, seed=seed)
    return found.to_json()


def export_model(
    folder: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    layout: str | None = None,
    base: str | Path | None = None,
) -> dict[str, Any]:
    """Write a run's result, a model or an adapter folder as `hf`, `onnx`, `gguf` or `adapter` (key layout) at `out`."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    importlib.import_module("mmft.fusion")
    from mmft.export.formats import export_folder

    return export_folder(folder, out, to=to, dtype=dtype, max_shard_size=max_shard_size, layout=layout, base=base)


def push(folder: str | Path, repo_id: str, *, private: bool = False) -> dict[str, Any]:
    """Upload a run's result, a model or an adapter folder to the hub, with a model card made from the run."""
    from mmft.quiet import quiet_upstream

    quiet_upstream()
    from mmft.export.hub import push_folder

    return push_folder(folder, repo_id, private=private)


def build_data(name: str, out: str | Path, *, rows: int | None = None) -> Path:
    """Write a shipped data set (`emoji-scenes/NAME`) as an ordinary messages + images folder."""
    from mmft.data.scenes import build_scene_set

    return build_scene_set(name.removeprefix("shipped:").removeprefix("emoji-scenes/"), Path(out), rows=rows)
