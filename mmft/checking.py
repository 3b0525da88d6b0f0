"""`mmft check`: every row of a recipe or a data set opened before anything is trained, and what is wrong with each."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmft.backbones.load import load_processor, meta_backbone
from mmft.data.causes import CAUSES, cause_of, remedies
from mmft.data.clean import write_clean
from mmft.data.formats import Incoming, incoming, source_name, source_path, told
from mmft.data.inspect_rows import Look
from mmft.data.inspect_sets import Found, Inspector, Places
from mmft.data.loader import RowRenderer
from mmft.data.render import Renderer
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
    """One data set, and what was found of it."""

    source: DataSource
    evaluation: bool
    incoming: Incoming
    found: Found = field(default_factory=Found)

    @property
    def name(self) -> str:
        """The name in reports."""
        return self.incoming.name

    def told(self) -> str:
        """What was read and how, for the console; of a table, its columns too."""
        good = self.found.rows - self.found.unread
        return told(self.name, good, self.incoming.format, self.incoming.layout, self.incoming.columns)


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
    count = (os.cpu_count() or 1) if workers is None else workers
    with closing(Places()) as names, journal.progress(None, "rows opened") as bar:
        sets = _opened(sources, how, names)
        with closing(Inspector(how.look, workers=count, progress=bar.update)) as inspector:
            for one in sorted(
                sets, key=lambda one: not one.evaluation
            ):  # what is held out first: rows may leak from it
                one.found = inspector.inspect(one.incoming.rows, one.name, evaluation=one.evaluation)
            shared = inspector.shared
    for one in sets:
        journal.say(one.told())
    notes += [f"{shared} training rows show a picture that an evaluation set asks about too"] if shared else []
    rows = [row for one in sets for row in _bad_rows(one, set(allow))]
    if rows:
        write_text(out, "".join(to_json(row) + "\n" for row in rows))
    return {
        "rows": sum(one.found.rows for one in sets),
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
    streamed: tuple[DataSource, ...] = ()


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
        streamed = tuple(one for one in train if one not in recipe.data.train)
        return sources, _How(look, kind_of(recipe).formats, recipe, streamed), notes + left
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


def _opened(sources: Sequence[tuple[DataSource, bool]], how: _How, names: Places) -> list[_Set]:
    """The sets with their first rows read; all tables have the columns of the first. `names` keeps the ids of rows."""
    recipe = how.recipe
    system, seed = (None, 0) if recipe is None else (recipe.data.system, recipe.train.seed)
    sets: list[_Set] = []
    columns: Columns | None = None
    for number, (source, evaluation) in enumerate(sources):
        described = partial(kind_of(recipe).columns, recipe) if recipe is not None and source in how.streamed else None
        found = incoming(
            source,
            twice=partial(_given_before, names, number),
            seed=seed,
            system=system,
            wanted=how.formats,
            columns=columns,
            described=described,
        )
        columns = columns or found.columns
        sets.append(_Set(source, evaluation, found))
    return sets


def _given_before(names: Places, number: int, name: str, where: str) -> str | None:
    return names.first(f"{number} {name}", where)


def _bad_rows(one: _Set, allow: set[str]) -> list[dict[str, Any]]:
    rows = []
    for where, (name, reasons) in sorted(one.found.bad.items(), key=lambda item: _place(item[0])):
        left = [(cause_of(reason), reason) for reason in reasons if cause_of(reason) not in allow]
        if left:
            row = {"set": one.name, "evaluation": one.evaluation, "where": where, "id": name}
            rows.append(row | {"cause": left[0][0], "causes": [cause for cause, _ in left], "reason": left[0][1]})
            rows[-1]["reasons"] = [reason for _, reason in left]
    return rows


def _place(where: str) -> tuple[str, int]:
    found = re.search(r"^(.*?)(\d+)$", where)
    return (found[1], int(found[2])) if found else (where, 0)


def _told(one: _Set, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bad = sum(row["set"] == one.name and row["evaluation"] == one.evaluation for row in rows)
    return {"name": one.name, "evaluation": one.evaluation, "rows": one.found.rows, "bad": bad}


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
