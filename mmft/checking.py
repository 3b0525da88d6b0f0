"""`mmft check`: every row of a recipe or a data set opened before anything is trained, and what is wrong with each."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmft.backbones.load import load_processor, meta_backbone
from mmft.data.causes import CAUSES, cause_of, remedies
from mmft.data.clean import write_clean
from mmft.data.formats import Loaded, load_samples, source_name, source_path
from mmft.data.inspect_rows import Look, Seen, inspect_rows
from mmft.data.likeness import Likes
from mmft.data.loader import RowRenderer
from mmft.data.render import Renderer
from mmft.data.sample import Sample
from mmft.data.stream_files import entries_of, entries_root
from mmft.data.tables import Columns
from mmft.errors import BackboneError, DataError, RecipeError, choices
from mmft.files import to_json, write_text
from mmft.journal import Journal
from mmft.kinds import kind_of
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import DataSection, DataSource, ModelSection, Recipe

FIRST = 5
"""Places of each cause in the table."""


@dataclass
class _Set:
    """One data set with what was found: place -> reasons."""

    source: DataSource
    loaded: Loaded
    evaluation: bool
    seen: list[Seen] = field(default_factory=list)
    found: dict[str, list[str]] = field(default_factory=dict)


def check(
    data: str | Path | Mapping[str, Any] | Sequence[str | Path],
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
    """Open and render every row of a recipe's sets, or of data files, and say what is wrong with each bad one.

    `against`: evaluation files that rows may not leak from (a recipe names its own); `model` and `max_length`: whose
    processor counts tokens, where there is no recipe; `allow`: causes that are let pass; `fix`: a folder (or for one
    file a file) for the training sets without their bad rows. Writes `out`, one line a bad row, where there is one.
    Raises RecipeError for an unknown cause, DataError for a set that cannot be read at all.
    """
    for cause in allow:
        if cause not in CAUSES:
            raise RecipeError(f"'{cause}' is no cause", where="--allow", allowed=choices(CAUSES, word=cause))
    begin, journal = time.monotonic(), Journal(None, quiet=quiet)
    sources, how, notes = _asked(data, overrides, against, model, max_length)
    sets = _read(sources, how, journal)
    samples = [sample for one in sets for sample in one.loaded.samples]
    count = (os.cpu_count() or 1) if workers is None else workers
    with journal.progress(len(samples), "rows opened") as bar:
        seen = inspect_rows(samples, how.look, workers=count if len(samples) > 200 else 0, progress=bar.update)
    for one in sets:
        one.seen, seen = seen[: len(one.loaded.samples)], seen[len(one.loaded.samples) :]
        for sample, found in zip(one.loaded.samples, one.seen, strict=True):
            if found.reasons:
                one.found[sample.where] = list(found.reasons)
        one.found |= {where: [reason] for where, reason in one.loaded.bad}
    _repeated(sets)
    shared = _leaked(sets)
    notes += [f"{shared} training rows show a picture that an evaluation set asks about too"] if shared else []
    rows = [row for one in sets for row in _bad_rows(one, set(allow))]
    if rows:
        write_text(out, "".join(to_json(row) + "\n" for row in rows))
    return {
        "rows": sum(len(one.loaded.samples) + len(one.loaded.bad) for one in sets),
        "bad": len(rows),
        "sets": [_told(one, rows) for one in sets],
        "causes": _by_cause(rows),
        "bad_rows": str(out) if rows else None,
        "do": remedies(
            {cause for row in rows if not row["evaluation"] for cause in row["causes"]},
            held_out=any(row["evaluation"] for row in rows),
            fixed=fix is not None,
            recipe=how.recipe is not None,
        ),
        "fixed": _fixed(sets, rows, Path(fix)) if fix is not None else [],
        "notes": notes,
        "seconds": round(time.monotonic() - begin, 2),
    }


@dataclass(frozen=True)
class _How:
    look: Look
    formats: tuple[str, ...]
    recipe: Recipe | None


def _asked(
    data: Any, overrides: Sequence[str], against: Sequence[str | Path], model: str | None, max_length: int | None
) -> tuple[list[tuple[DataSource, bool]], _How, list[str]]:
    """The sets (with: is it for evaluation), how their rows are looked at, and what could not be."""
    is_recipe = isinstance(data, Mapping) or (isinstance(data, str | Path) and str(data).endswith((".yaml", ".yml")))
    if is_recipe:
        recipe = load_recipe(data, overrides)
        renderer, notes = _renderer(recipe)
        look = Look(recipe.data.max_image_pixels, renderer=renderer)
        train, left = _files(recipe.data.train)
        sources = [(one, False) for one in train] + [(one, True) for one in recipe.data.eval]
        return sources, _How(look, kind_of(recipe).formats, recipe), notes + left
    paths = [data] if isinstance(data, str | Path) else list(data)
    sources = [(DataSource(path=str(one)), False) for one in paths]
    sources += [(DataSource(path=str(one)), True) for one in against]
    limits = DataSection(train=(sources[0][0],))
    length, pixels = max_length or limits.max_length, limits.max_image_pixels
    if model is None:
        return sources, _How(Look(pixels), (), None), ["no model is given: tokens are not counted (--model)"]
    made = Renderer(load_processor(ModelSection(name_or_path=model)), max_length=length, max_image_pixels=pixels)
    return sources, _How(Look(pixels, renderer=made), (), None), []


def _files(sources: Sequence[DataSource]) -> tuple[list[DataSource], list[str]]:
    """The sets with a streamed one as its files, and what is said of files that lie elsewhere."""
    found: list[DataSource] = []
    notes = []
    for source in sources:
        entries = entries_of(Path(source.path)) if source.streaming else []
        root = source.media_root or str(entries_root(Path(source.path)))
        found += [source] if not source.streaming else [
            source.model_copy(update={"path": one.place, "streaming": False, "media_root": root, "name": None})
            for one in entries
            if not one.remote
        ]  # fmt: skip
        if far := sum(one.remote for one in entries):
            notes.append(f"{far} of {len(entries)} files of {source_name(source)} lie elsewhere and are not checked")
    if not found:
        raise DataError("all files lie elsewhere", where="data.train", do="fetch some, and check those")
    return found, notes


def _renderer(recipe: Recipe) -> tuple[RowRenderer | None, list[str]]:
    kind = kind_of(recipe)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            processor = meta_backbone(kind.base(recipe, Path(scratch))).processor
            if processor is not None:
                return kind.renderer(recipe, processor), []
    except (BackboneError, DataError) as error:
        return None, [f"tokens are not counted: {error.problems[0].what}"]
    return None, ["tokens are not counted: the model has no processor at hand"]


def _read(sources: Sequence[tuple[DataSource, bool]], how: _How, journal: Journal) -> list[_Set]:
    system = how.recipe.data.system if how.recipe is not None else None
    seed = how.recipe.train.seed if how.recipe is not None else 0
    sets: list[_Set] = []
    columns: Columns | None = None
    for source, evaluation in sources:
        loaded = load_samples(source, seed=seed, system=system, wanted=how.formats, columns=columns)
        columns = columns or loaded.columns
        journal.say(loaded.told())
        sets.append(_Set(source, loaded, evaluation))
    return sets


def _repeated(sets: Sequence[_Set]) -> None:
    """Rows whose content (texts and media) stood before, among the training rows and within each evaluation set."""
    training: dict[str, str] = {}
    for one in sets:
        first = {} if one.evaluation else training
        for sample, seen in zip(one.loaded.samples, one.seen, strict=True):
            if seen.content in first:
                one.found.setdefault(sample.where, []).append(f"the row is the same as {first[seen.content]}")
            first.setdefault(seen.content, sample.where)


def _leaked(sets: Sequence[_Set]) -> int:
    """Training rows that an evaluation set holds too: the same picture (by its bytes, or by its looks) with the same
    question; of pairs and tables, the same picture; without pictures, the same content. Returns how many more share a
    picture only."""
    likes: dict[str, Likes] = {}
    held: dict[tuple[str, str], str] = {}
    shown: set[str] = set()
    for one in sets:
        for sample, seen in zip(one.loaded.samples, one.seen, strict=True) if one.evaluation else ():
            name, asked = f"{one.loaded.name}: {sample.where}", _asks(sample)
            held.setdefault((asked, seen.content), name)
            for digest, look in seen.pictures:
                held.setdefault((asked, digest), name)
                shown.add(digest)
                if look.telling:
                    likes.setdefault(asked, Likes()).add(look, name)
    shared = 0
    for one in sets:
        for sample, seen in zip(one.loaded.samples, one.seen, strict=True) if not one.evaluation else ():
            asked = _asks(sample)
            kept = held.get((asked, seen.content)) or _seen_before(seen, asked, held, likes.get(asked))
            if kept is not None:
                one.found.setdefault(sample.where, []).append(f"the row is also in the evaluation set {kept}")
            elif any(digest in shown for digest, _ in seen.pictures):
                shared += 1
    return shared


def _seen_before(seen: Seen, asked: str, held: Mapping[tuple[str, str], str], likes: Likes | None) -> str | None:
    for digest, look in seen.pictures:
        name = held.get((asked, digest)) or (likes.find(look) if likes is not None and look.telling else None)
        if name is not None:
            return name
    return None


def _asks(sample: Sample) -> str:
    """The row's questions, spaces and capitals aside; "" for rows without turns."""
    return " ".join(" ".join(turn.text for turn in sample.turns if turn.role == "user").lower().split())


def _bad_rows(one: _Set, allow: set[str]) -> list[dict[str, Any]]:
    ids = {sample.where: sample.id for sample in one.loaded.samples}
    rows = []
    for where, reasons in sorted(one.found.items(), key=lambda item: _place(item[0])):
        left = [(cause_of(reason), reason) for reason in reasons if cause_of(reason) not in allow]
        if left:
            row = {"set": one.loaded.name, "evaluation": one.evaluation, "where": where, "id": ids.get(where)}
            rows.append(row | {"cause": left[0][0], "causes": [cause for cause, _ in left], "reason": left[0][1]})
            rows[-1]["reasons"] = [reason for _, reason in left]
    return rows


def _place(where: str) -> tuple[str, int]:
    found = re.search(r"^(.*?)(\d+)$", where)
    return (found[1], int(found[2])) if found else (where, 0)


def _told(one: _Set, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    total = len(one.loaded.samples) + len(one.loaded.bad)
    bad = sum(row["set"] == one.loaded.name and row["evaluation"] == one.evaluation for row in rows)
    return {"name": one.loaded.name, "evaluation": one.evaluation, "rows": total, "bad": bad}


def _by_cause(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    table = []
    for cause in CAUSES:
        fitting = [row for row in rows if row["cause"] == cause]
        if fitting:
            places = [re.sub(r"^.*/", "", str(row["where"])) for row in fitting[:FIRST]]
            table.append({"cause": cause, "rows": len(fitting), "first": places, "reason": fitting[0]["reason"]})
    return table


def _fixed(sets: Sequence[_Set], rows: Sequence[Mapping[str, Any]], out: Path) -> list[dict[str, Any]]:
    train = [one for one in sets if not one.evaluation]
    bad = {str(row["where"]) for row in rows}
    written = []
    for one in train:
        path = source_path(one.source)
        file = out if len(train) == 1 and out.suffix else out / path.name
        root = one.source.media_root or str(path.parent)
        written.append({"file": str(file), "rows": write_clean(path, file, bad), "media_root": root})
    return written
