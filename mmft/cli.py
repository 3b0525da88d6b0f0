"""The command line: one function per verb, which calls the function of the same name in `mmft` and prints."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import mmft
from mmft.errors import MmftError

app = typer.Typer(
    name="mmft",
    help="Parameter-efficient fine-tuning of multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[str, typer.Argument(help="Recipe file (YAML).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, for example train.learning_rate=1e-4")]
Fetch = Annotated[
    str | None, typer.Option(help="FILE.py:NAME of a function of (url, path) that brings streamed shards.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


def _show(value: Any, *, as_json: bool, text: str | None = None) -> None:
    sys.stdout.write((json.dumps(value, indent=2, default=str) if as_json or text is None else text) + "\n")


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A plain table for standard output: aligned columns, no colour, good for pipes."""
    from mmft.summary import grid

    return "\n".join((title, *grid(columns, rows)))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest valid checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Delete what the run folder holds first.")] = False,
    quiet: Annotated[bool, typer.Option(help="Print only the result.")] = False,
    objective: Annotated[
        str | None, typer.Option(help="FILE.py:NAME of a loss of your own in the place of the recipe's.")
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="FILE.py:NAME of a reward function in the place of the recipe's (again).")
    ] = None,
    fetch: Fetch = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without the fast path: train.fast=false.")] = False,
    as_json: Json = False,
) -> None:
    """Train, save, merge, verify, evaluate, report."""
    from mmft.summary import summary_text

    report = mmft.train(
        recipe,
        [*(overrides or []), *(["train.fast=false"] if plain else [])],
        resume=resume,
        overwrite=overwrite,
        quiet=quiet,
        objective=objective,
        rewards=reward or [],
        fetch=fetch,
    )
    if report:  # ranks other than 0 have none
        _show(report, as_json=as_json, text=summary_text(report))


@app.command()
def validate(recipe: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check a recipe and say all that is wrong with it."""
    values = mmft.validate(recipe, overrides or [])
    _show(values, as_json=as_json, text=f"{recipe}: a valid recipe for a run named {values['name']!r}")


@app.command()
def check(
    data: Annotated[list[str], typer.Argument(help="A recipe (YAML, then key=value), or data files and folders.")],
    against: Annotated[list[Path] | None, typer.Option(help="Evaluation data that rows may not be in.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose processor counts tokens, without a recipe.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens, without a recipe.")] = None,
    allow: Annotated[str, typer.Option(help="Causes to let pass, with commas: alpha,rotated.")] = "",
    fix: Annotated[Path | None, typer.Option(help="Write the training sets without their bad rows here.")] = None,
    out: Annotated[Path, typer.Option(help="Where the bad rows are listed.")] = Path("bad_rows.jsonl"),
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core if not given.")] = None,
    quiet: Annotated[bool, typer.Option(help="Print only the result.")] = False,
    as_json: Json = False,
) -> None:
    """Open every row before training and say what is wrong with which; exit code 3 when a row is bad."""
    recipe = data[0].endswith((".yaml", ".yml"))
    values = mmft.check(
        data[0] if recipe else data,
        data[1:] if recipe else (),
        against=against or [],
        model=model,
        max_length=max_length,
        allow=[cause for cause in allow.split(",") if cause],
        fix=fix,
        out=out,
        workers=workers,
        quiet=quiet,
    )
    from mmft.summary import check_text

    _show(values, as_json=as_json, text=check_text(values))
    if values["bad"]:
        raise typer.Exit(3)


@app.command()
def stats(
    data: Annotated[Path, typer.Argument(help="Data file or folder.")],
    model: Annotated[str | None, typer.Option(help="Whose processor counts tokens.")] = None,
    media_root: Annotated[Path | None, typer.Option(help="Folder that media paths are relative to.")] = None,
    limit: Annotated[int, typer.Option(help="Rows that are measured.")] = 2000,
    html: Annotated[Path | None, typer.Option(help="Also write a page of histograms there.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a data set holds: rows, media, sizes, lengths, answers, classes."""
    values = mmft.stats(data, model=model, media_root=media_root, limit=limit, html=html)
    cells = [
        [name, "  ".join(f"{k} {v}" for k, v in one.items()) if isinstance(one, dict) else str(one)]
        for name, one in values.items()
        if one != {}
    ]
    _show(values, as_json=as_json, text=_table(str(data), ["what", "values"], cells))


@app.command()
def convert(
    data: Annotated[Path, typer.Argument(help="Data file or folder.")],
    out: Annotated[Path, typer.Argument(help="New folder, or for parquet a new file.")],
    to: Annotated[str, typer.Option(help="messages, llava, parquet or webdataset.")],
    media_root: Annotated[Path | None, typer.Option(help="Folder that media paths are relative to.")] = None,
    as_json: Json = False,
) -> None:
    """Write a data set in another form, with its media; exit code 3 when bad rows were left out."""
    values = mmft.convert(data, out, to=to, media_root=media_root)
    told = "".join(f"\nleft out {one['where']}: {one['reason']}" for one in values["bad"][:5])
    _show(values, as_json=as_json, text=f"{values['rows']} rows written to {out}, {len(values['bad'])} left out{told}")
    if values["bad"]:
        raise typer.Exit(3)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model and measure the largest step's memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print parts, trainable counts, rows, token lengths, steps and memory; train nothing."""
    from mmft.summary import plan_text

    values = mmft.plan(recipe, overrides or [], probe=probe)
    _show(values, as_json=as_json, text=plan_text(values))


@app.command()
def verify_fast(
    recipe: Recipe,
    overrides: Overrides = None,
    batches: Annotated[int, typer.Option(help="Optimizer steps that are replayed.")] = 4,
    as_json: Json = False,
) -> None:
    """Replay real steps on the plain and the fast path; exit code 1 when loss or gradients part."""
    from mmft.summary import fast_text

    values = mmft.verify_fast(recipe, overrides or [], batches=batches)
    _show(values, as_json=as_json, text=fast_text(values))
    if not values["ok"]:
        raise typer.Exit(1)


@app.command()
def preview(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="How many rows.")] = 8,
    out: Annotated[Path | None, typer.Option(help="HTML file; NAME-preview.html if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Write a page that shows rows as the model gets them, trained tokens coloured."""
    path = mmft.preview(recipe, overrides or [], rows=rows, out=out)
    _show({"page": str(path)}, as_json=as_json, text=str(path))


@app.command()
def trace(
    recipe: Recipe,
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(help="Which row, counted from 0.")] = 0,
    as_json: Json = False,
) -> None:
    """Walk one row through every station from file to merged weight."""
    stations = mmft.trace(recipe, overrides or [], row=row)
    columns = ["station", "what", "shape", "digest", "code"]
    cells = [[str(station[column]) for column in columns] for station in stations]
    _show(stations, as_json=as_json, text=_table(f"row {row} of {recipe}", columns, cells))


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder, hub id, shipped:nano-vlm or a model type (qwen2_vl); else the adapter's base."),
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option(help="Show what these adapter targets hit (again, or with commas).")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers: last:8, first:4, 0-3,7.")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out a part, part.sub or a glob over module names.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Describe this adapter folder by the model's parts.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    as_json: Json = False,
) -> None:
    """Print the parts of a model with counts, and what targets hit or an adapter touches, without loading weights."""
    from mmft.summary import inspect_text

    values = mmft.inspect(
        model, revision=revision, targets=targets or [], layers=layers, exclude=exclude or [], adapter=adapter
    )
    _show(values, as_json=as_json, text=inspect_text(values))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Run folder, adapter folder, model folder or hub id.")],
    question: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="Picture the question is about.")] = None,
    which: Annotated[str | None, typer.Option(help="For a run folder: base, adapter or merged.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base of an adapter folder, where it is not the recorded one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Answer a question about an image."""
    values = mmft.generate(model, question=question, image=image, which=which, base=base, max_new_tokens=max_new_tokens)
    _show(values, as_json=as_json, text=values["answer"])


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")], fetch: Fetch = None, as_json: Json = False
) -> None:
    """Answer the evaluation rows of a run again and rewrite its report."""
    from mmft.summary import summary_text

    values = mmft.evaluate(run, fetch=fetch)
    _show(values, as_json=as_json, text=summary_text(values))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")], as_json: Json = False) -> None:
    """Write report.html of a run again from its files."""
    path = mmft.report(run)
    _show({"page": str(path)}, as_json=as_json, text=str(path))


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="Run folder or adapter folder.")],
    out: Annotated[Path | None, typer.Option(help="New folder for an adapter folder; a run has its merged/.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, where it is not the recorded one.")] = None,
    onto: Annotated[str | None, typer.Option(help="base or dequantized; the run's choice if not given.")] = None,
    fetch: Fetch = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base, tensor by tensor."""
    from mmft.summary import merge_text

    values = mmft.merge(adapter, base=base, out=out, onto=onto, fetch=fetch)
    _show(values, as_json=as_json, text=merge_text(values))


@app.command()
def verify(
    base: Annotated[str, typer.Argument(help="Base model.")],
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    merged: Annotated[Path, typer.Argument(help="Merged folder.")],
    as_json: Json = False,
) -> None:
    """Prove that a merged folder is its base plus the adapter."""
    from mmft.summary import merge_text

    values = mmft.verify(base, adapter, merged)
    _show(values, as_json=as_json, text=merge_text(values))


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(help="LoRA adapter folders of one base.")],
    out: Annotated[Path, typer.Option(help="New adapter folder.")],
    weights: Annotated[str | None, typer.Option(help="One number each, 0.7,0.3; 1/n each if not given.")] = None,
    method: Annotated[str, typer.Option(help="cat (exact), svd, linear, ties, dare_ties, ties_svd, ...")] = "cat",
    density: Annotated[float | None, typer.Option(help="Share of values that ties and dare keep.")] = None,
    rank: Annotated[int | None, typer.Option(help="Largest rank of a *svd result.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of dare.")] = 0,
    as_json: Json = False,
) -> None:
    """Make one LoRA adapter of several, without their base."""
    values = mmft.combine(adapters, out, weights=weights, method=method, density=density, rank=rank, seed=seed)
    columns = ["adapter", "weight", "modules", "rank", "norm"]
    rows = [[str(found["folder"]), *(f"{found[key]:.4g}" for key in columns[1:])] for found in values["adapters"]]
    rows.append([str(out), "", *(f"{values[key]:.4g}" for key in ("modules", "rank", "norm"))])
    clash = values["sign_conflicts"]
    tail = f"\ndifference from the weighted sum: {values['difference']:.2%}"
    tail += f"\nvalues with opposite signs: {clash:.2%}" if clash is not None else ""
    _show(values, as_json=as_json, text=_table(f"{method} of {len(adapters)} adapters", columns, rows) + tail)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Run, model or adapter folder.")],
    to: Annotated[str, typer.Option(help="hf, onnx, gguf or adapter.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the folder's own if not given.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file (hf).")] = "5GB",
    layout: Annotated[str | None, typer.Option(help="Key layout (adapter), for example transformers-4.51.")] = None,
    base: Annotated[Path | None, typer.Option(help="Base folder (adapter), where it is not the recorded one.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format: Hugging Face folder, ONNX, GGUF, or an adapter in another key layout."""
    from mmft.summary import export_text

    values = mmft.export_model(folder, out, to=to, dtype=dtype, max_shard_size=max_shard_size, layout=layout, base=base)
    _show(values, as_json=as_json, text=export_text(values))


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Run, model or adapter folder.")],
    repo_id: Annotated[str, typer.Argument(help="ORGANISATION/NAME on the hub.")],
    private: Annotated[bool, typer.Option(help="Make the repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a result to the hub, with a model card made from the run."""
    values = mmft.push(folder, repo_id, private=private)
    _show(values, as_json=as_json, text=values["url"])


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="emoji-scenes/NAME")],
    out: Annotated[Path, typer.Argument(help="New folder.")],
    rows: Annotated[int | None, typer.Option(help="Only this many rows.")] = None,
    as_json: Json = False,
) -> None:
    """Write a shipped data set as an ordinary folder of rows and images."""
    path = mmft.build_data(name, out, rows=rows)
    _show({"rows": str(path)}, as_json=as_json, text=str(path))


def _ends_so(code: int) -> None:
    """From here on a second signal ends the process at once with the status of the first, which it stopped for."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(code))


def main() -> None:
    """Run the command line; an MmftError becomes its text and its exit code, a traceback only with --debug."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except MmftError as error:
        if debug:
            raise
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code > 128:
            _ends_so(stop.code)
        raise
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
