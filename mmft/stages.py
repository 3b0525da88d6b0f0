"""The stages of a run that `run.py` tells as a story; each takes what the one before gave."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs

from mmft.adapters.build import Adapted
from mmft.adapters.store import adapter_digest
from mmft.backbones.fingerprint import fingerprint
from mmft.backbones.load import Backbone
from mmft.data.audit import audit
from mmft.data.audit import fingerprint as fingerprint_samples
from mmft.data.augment import Augmentation
from mmft.data.formats import Loaded, load_many, source_name
from mmft.data.lengths import lengths_of
from mmft.data.loader import RowRenderer
from mmft.data.order import StepPlan
from mmft.data.readable import readable
from mmft.data.render import Renderer, TooLongError
from mmft.data.sample import Sample
from mmft.data.steps import plan_steps
from mmft.data.stream_files import Fetch
from mmft.data.streaming import Streamed
from mmft.engine.budget import with_memory
from mmft.engine.callbacks import Callback, MetricsWriter, Progress
from mmft.engine.guards import Interrupted, StopSignals
from mmft.engine.loop import Engine, TrainJob
from mmft.engine.meeting import MEETING
from mmft.engine.sharding import is_sharded, plain_ranks, refuse_launcher
from mmft.engine.state import TrainState
from mmft.engine.step_memory import Peak
from mmft.errors import DataError, Problem, RecipeError, choices
from mmft.fast.kernel_caches import give_back
from mmft.fast.known import fast_plan, install
from mmft.fast.packing import demand
from mmft.fast.plan import Setting, Work
from mmft.files import write_json
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.kinds.base import Datasets, check_formats
from mmft.kinds.custom import ObjectiveFactory, make_custom, source_digest
from mmft.kinds.streams import opened_streams, spaced
from mmft.objectives.base import Objective
from mmft.recipe.load import recipe_digest
from mmft.recipe.schema import Recipe, TrainSection
from mmft.runfolder import RunFolder, read_json, versions

SAMPLED_ROWS = 32  # rows that are rendered before training, to look at where their answers end


def make_accelerator(section: TrainSection) -> Accelerator:
    """accelerate for device, ranks and trackers; precision and accumulation are the engine's own.

    Raises RecipeError for a tracker that is unknown or not installed (accelerate would leave it out in silence), and
    where accelerate was configured for what mmft does not train with.
    """
    refuse_launcher()
    there = [str(tracker) for tracker in get_available_trackers()]
    for position, name in enumerate(section.report_to):
        if name not in there:
            raise RecipeError(
                f"tracker '{name}' is not installed here, or unknown to accelerate",
                where=f"train.report_to[{position}]",
                allowed=choices(there, word=name),
                do="install its package, or take it out; metrics.jsonl is always written",
            )
    with plain_ranks():
        return Accelerator(
            mixed_precision="no",
            gradient_accumulation_steps=1,
            log_with=list(section.report_to) or None,
            project_dir=str(section.output_dir),
            kwargs_handlers=[
                InitProcessGroupKwargs(init_method=MEETING, timeout=timedelta(seconds=section.ddp_timeout)),
            ],
        )


def load_datasets(recipe: Recipe, processor: Any, journal: Journal, *, fetch: Fetch | None = None) -> Datasets:
    """Read and check all rows; what is left out is counted and named in the journal. Of streamed sets the files are
    counted (`fetch` brings those that lie elsewhere).

    Raises DataError with the first causes by file:line, or when every row of a set is too long.
    """
    data, seed, kind = recipe.data, recipe.train.seed, kind_of(recipe)
    renderer, workers = kind.renderer(recipe, processor), recipe.train.dataloader_num_workers
    plain = [source for source in data.train if not source.streaming]
    loaded = readable(load_many(plain, data, seed, wanted=kind.formats), data, workers=workers, journal=journal)
    train: Sequence[Sample] = fitting(_rows(recipe, loaded), renderer, journal, name="train")
    stream = None
    if len(plain) < len(data.train):
        train = stream = opened_streams(recipe, train, journal, fetch=fetch)
        for line in stream.told():
            journal.say(line)
    columns = next((one.columns for one in (*loaded, *(stream.streamed if stream else ())) if one.columns), None)
    evals: dict[str, list[Sample]] = {}
    held = load_many(data.eval, data, seed, wanted=kind.formats, columns=columns)
    held = readable(held, data, workers=workers, journal=journal)
    for source, one in zip(data.eval, held, strict=True):
        loaded.append(one)
        name = source_name(source)
        evals.setdefault(name, []).extend(fitting(_rows(recipe, [one]), renderer, journal, name=name))
    for one in loaded:
        journal.say(one.told())
        _tell_bad(one, journal)
    if isinstance(renderer, Renderer):
        _warn_unstopped(spaced(train, SAMPLED_ROWS, renderer), renderer, journal)
    changes = Augmentation.of(data.augmentation, seed=seed)
    if stream is not None:
        stream.augment = changes
        rest = [sample for part in stream.parts if isinstance(part, list) for sample in part]
        return Datasets(stream, evals, renderer, stream.fingerprint(fingerprint_samples(rest)))
    if changes is not None:
        train = [dataclasses.replace(sample, augment=changes) for sample in train]
    return Datasets(kind.balanced(recipe, list(train)), evals, renderer, fingerprint_samples(train))


def _rows(recipe: Recipe, loaded: list[Loaded]) -> list[Sample]:
    kind = kind_of(recipe)
    check_formats(kind, recipe, loaded)
    return kind.samples(recipe, [sample for one in loaded for sample in one.samples])


def fitting(samples: list[Sample], renderer: RowRenderer, journal: Journal, *, name: str) -> list[Sample]:
    """The rows that are trained on or answered: all of them, or with `over_length: drop` those short enough. Rows that
    will be cut or whose pictures will shrink are counted, listed as an event, and tried.

    Every length is taken before training (no picture is decoded for it), so that a long row is not met hours later.
    Raises DataError naming the longest rows that stay too long, or when no row is left.
    """
    with journal.progress(len(samples), f"{name}: lengths") as bar:
        lengths = lengths_of(renderer, samples, progress=bar.update)
    long = {index: length for index, length in enumerate(lengths) if length > renderer.max_length}
    if renderer.over_length == "error":
        _refuse_long(samples, long, renderer, name=name)
        return samples
    if renderer.over_length in ("truncate_text", "shrink_images"):
        _shorten(samples, long, renderer, journal, name=name)
        return samples
    kept = [sample for index, sample in enumerate(samples) if index not in long]
    _list_long(samples, long, journal, name=name, done="dropped")
    journal.say(f"{name}: dropped {len(long)} of {len(samples)} rows longer than {renderer.max_length} tokens")
    if samples and not kept:
        raise DataError(
            f"all {len(samples)} rows of '{name}' are longer than {renderer.max_length} tokens",
            where="data.max_length",
            allowed=f"data.max_length of at least {min(long.values())} keeps the shortest row",
            do="raise data.max_length, or set data.over_length: truncate_text",
        )
    return kept


def _shorten(
    samples: list[Sample], long: dict[int, int], renderer: RowRenderer, journal: Journal, *, name: str
) -> None:
    """Say which rows will be made to fit, after each of them was; a row that cannot is refused now, not hours later."""
    if not long:
        return
    still: dict[int, int] = {}
    for index, length in long.items():
        try:
            if isinstance(renderer, Renderer):
                renderer.render(samples[index])
        except TooLongError:
            still[index] = length
    if renderer.over_length == "shrink_images" and not isinstance(renderer, Renderer):
        still = long
    _refuse_long(samples, still, renderer, name=name)
    done = "cut" if renderer.over_length == "truncate_text" else "shown smaller pictures"
    journal.warn(f"{name}: {len(long)} of {len(samples)} rows are longer than {renderer.max_length} tokens and {done}")
    _list_long(samples, long, journal, name=name, done=done)


def _list_long(samples: list[Sample], long: dict[int, int], journal: Journal, *, name: str, done: str) -> None:
    rows = [[samples[index].where, samples[index].id, length] for index, length in long.items()]
    journal.event("long_rows", set=name, done=done, rows=rows)


def _refuse_long(samples: list[Sample], long: dict[int, int], renderer: RowRenderer, *, name: str) -> None:
    if not long:
        return
    worst = sorted(long, key=lambda index: -long[index])[:5]
    raise DataError(
        Problem(
            f"the row has {long[index]} tokens (one of {len(long)} over-long rows of {len(samples)} in '{name}')",
            where=samples[index].where or f"id {samples[index].id}",
            allowed=f"at most {renderer.max_length} tokens (data.max_length), image tokens included",
            do="raise data.max_length, or set data.over_length to drop, truncate_text or shrink_images",
        )
        for index in worst
    )


def _tell_bad(loaded: Loaded, journal: Journal) -> None:
    """Bad rows that `max_bad_fraction` allows: their number and the first of them on the console, all as an event."""
    if not loaded.bad:
        return
    total = len(loaded.bad) + len(loaded.samples)
    first = "; ".join(f"{where}: {reason}" for where, reason in loaded.bad[:3])
    journal.warn(f"{loaded.name}: {len(loaded.bad)} of {total} rows are bad and left out ({first})")
    journal.event("bad_rows", set=loaded.name, rows=[list(row) for row in loaded.bad])


def _warn_unstopped(samples: Sequence[Sample], renderer: Renderer, journal: Journal) -> None:
    """Look at some rows: does the last trained token end the answer?"""
    seen = audit(samples, renderer)
    if seen.unstopped:
        journal.warn(
            f"{seen.unstopped} of {seen.measured} rows looked at have no end token behind the last answer: a model "
            "trained on them does not learn where to stop; use a chat template that ends an assistant's turn"
        )


def calibration(recipe: Recipe, backbone: Backbone, datasets: Datasets) -> list[dict[str, torch.Tensor]] | None:
    """What a data-driven start (EVA) looks at; None for other starts."""
    if recipe.adapter.init_lora_weights != "eva":
        return None
    return kind_of(recipe).calibration(recipe, backbone, datasets)


def identity(recipe: Recipe, backbone: Backbone, datasets: Datasets, plan: StepPlan) -> dict[str, str]:
    """Digests of what a resumed run must share with the run it goes on with."""
    base = fingerprint(backbone.folder) if backbone.folder is not None else {"name": backbone.name}
    start = recipe.adapter.init_from
    return {
        **({"init_from": adapter_digest(Path(start).expanduser())} if start else {}),
        "recipe": recipe_digest(recipe),
        **{f"base file {name}": value for name, value in base.items()},
        "torch": torch.__version__.partition("+")[0],
        "data": datasets.fingerprint,
        "rows_per_step": str(plan.rows_per_step),
    }


def train_stage(
    run: RunFolder,
    adapted: Adapted,
    datasets: Datasets,
    accelerator: Accelerator,
    *,
    resume: bool,
    factory: ObjectiveFactory | None = None,
    extra: Sequence[Callback] = (),
) -> TrainState:
    """Train and write `training.json`; `factory` makes an objective that takes the place of the recipe's.

    Raises Interrupted (SystemExit 128 + n) after a signal's checkpoint.
    """
    recipe = run.recipe
    plan, total = plan_steps(recipe, datasets.train, accelerator.num_processes)
    if recipe.train.report_to:
        accelerator.init_trackers(recipe.name)  # below train.output_dir, so in the run folder; rank 0 only
    writer = MetricsWriter(run.journal, accelerator, every=recipe.train.logging_steps)
    held = next(iter(datasets.evals.values()), [])
    setting = Setting(
        recipe,
        adapted,
        datasets.renderer,
        datasets.train,
        accelerator.num_processes,
        custom=factory is not None,
        steps=plan,
        evals=held,
        sharded=is_sharded(adapted.model),
    )
    work = Work(adapted, _objective(recipe, adapted, datasets, factory), datasets.renderer, steps=plan)
    fast, work = install(fast_plan(setting), setting, work)
    demand(recipe, fast)
    give_back()
    run.journal.table("fast path", ["optimisation", "", "reason", "saves"], fast.table())
    job = TrainJob(
        adapted=work.adapted,
        objective=work.objective,
        samples=datasets.train,
        eval_samples=held,
        renderer=work.renderer,
        plan=work.steps or plan,
        total_steps=total,
        eval_batch_size=recipe.evaluate.per_device_eval_batch_size,
        section=recipe.train,
        folder=run.path,
        prepare=work.prepare,
        sources=_sources(datasets.train),
        identity=identity(recipe, adapted.backbone, datasets, plan)
        | ({"fast": fast.digest} if fast.digest else {})
        | ({"objective": source_digest(factory)} if factory else {})
        | {f"reward {name}": source_digest(reward) for name, reward in datasets.rewards.items()},
    )
    job, memory = with_memory(job, run.journal, accelerator, fast=fast.on("lora_fused"))
    callbacks = [Progress(run.journal), *kind_of(recipe).watchers(run, adapted, datasets), writer, *extra]
    engine = Engine(job, accelerator=accelerator, journal=run.journal, callbacks=callbacks)
    begin = time.monotonic()
    with StopSignals() as signals:
        try:
            with Peak() as peak:
                state = engine.fit(resume=resume, signals=signals)
        finally:
            work.release()
        if accelerator.is_main_process:
            _write_facts(run, adapted, state, seconds=time.monotonic() - begin, rows=len(datasets.train), plan=plan)
            if memory is not None:
                write_json(run.facts, read_json(run.facts) | {"memory": memory.to_json() | {"peak": peak.bytes}})
        _raise_signal(run, state)
    return state


def _raise_signal(run: RunFolder, state: TrainState) -> None:
    if (state.stopped or "").startswith("signal"):
        number = int((state.stopped or "signal 15").split()[1])
        text = f"stopped by signal {number} after step {state.step}; go on with --resume"
        run.journal.warn(text)
        raise Interrupted(number, text)


def _sources(samples: Sequence[Sample]) -> tuple[str, ...]:
    """The training sets whose losses are told apart; () where there is one."""
    names = samples.names if isinstance(samples, Streamed) else (one.source for one in samples)
    found = sorted(set(names))
    return tuple(found) if len(found) > 1 else ()


def _objective(recipe: Recipe, adapted: Adapted, datasets: Datasets, factory: ObjectiveFactory | None) -> Objective:
    if factory is not None:
        return make_custom(factory, adapted.model, recipe)
    return kind_of(recipe).objective(recipe, adapted, datasets)


def _write_facts(
    run: RunFolder, adapted: Adapted, state: TrainState, *, seconds: float, rows: int, plan: StepPlan
) -> None:
    before = read_json(run.facts)
    steps_here = state.step - before.get("steps", 0)
    spent = before.get("seconds", 0.0) + (seconds if steps_here or not before else 0.0)
    trained = {name: param.numel() for name, param in adapted.trainable().items()}
    write_json(
        run.facts,
        {
            "steps": state.step,
            "seconds": spent,
            "samples_per_second": state.samples_consumed / max(spent, 1e-9),
            "samples": state.samples_consumed,
            "tokens": state.tokens_consumed,
            "rows": rows,
            "rows_per_step": plan.rows_per_step,
            "epochs": plan.epoch_at(state.step),
            "peak_memory": peak_memory(),
            "trainable": sum(trained.values()),
            "parts": adapted.table(),
            "stopped": state.stopped,
            "best_loss": state.best_loss,
            "seed": run.recipe.train.seed,
            "method": adapted.method,
            "versions": versions(),
        },
    )


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (device memory where there is a device)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def local_folder(backbone: Backbone) -> Path:
    """The base's own files, which a merge reads."""
    if backbone.folder is None:
        raise RecipeError(
            f"{backbone.name} has no local files", where="model.name_or_path", do="give a folder or hub id"
        )
    return backbone.folder
