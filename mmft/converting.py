"""`mmft convert` and `mmft stats`: a data set written in another form, and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from mmft.data.convert import write_samples
from mmft.data.formats import Loaded, load_samples
from mmft.data.media import image_size
from mmft.data.sample import Sample
from mmft.errors import DataError
from mmft.evaluation.bars import bars, histogram
from mmft.journal import Journal
from mmft.recipe.schema import DataSource

MAX_PIXELS = 40_000_000
COMMON = 10
"""Most common answers that are told."""


def convert(
    data: str | Path, out: str | Path, *, to: str, media_root: str | Path | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Write a data set in another form; bad rows are left out and counted. See `data.convert.write_samples`."""
    journal = Journal(None, quiet=quiet)
    loaded = _load(data, media_root)
    journal.say(loaded.told())
    if not loaded.samples:
        raise DataError("no row is good", where=str(data), do="run mmft check, which says what is wrong")
    with journal.progress(len(loaded.samples), "rows written") as bar:
        write_samples(loaded.samples, Path(out), to=to, progress=bar.update)
    bad = [{"where": where, "reason": reason} for where, reason in loaded.bad]
    return {"out": str(out), "to": to, "rows": len(loaded.samples), "bad": bad}


def stats(
    data: str | Path,
    *,
    model: str | None = None,
    media_root: str | Path | None = None,
    limit: int = 2000,
    html: str | Path | None = None,
) -> dict[str, Any]:
    """Rows, media per row, sizes and aspect ratios of pictures, lengths of texts (tokens with a `model`), answers and
    classes of a data set. Sizes and tokens are those of up to `limit` evenly spaced rows; nothing is decoded.
    With `html` a page of histograms is written there."""
    loaded = _load(data, media_root)
    samples = loaded.samples
    chosen = [samples[at * len(samples) // limit] for at in range(limit)] if len(samples) > limit else samples
    sizes = [_size(ref) for sample in chosen for ref in sample.media if ref.kind == "image"]
    there = [size for size in sizes if size is not None]
    found: dict[str, Any] = {
        "rows": len(samples),
        "bad": len(loaded.bad),
        "format": loaded.format,
        "media_per_row": dict(sorted(Counter(len(sample.media) for sample in samples).items())),
        "media": dict(Counter(ref.kind for sample in samples for ref in sample.media)),
        "turns": dict(sorted(Counter(len(sample.turns) for sample in samples).items())),
        "measured": len(chosen),
        "unreadable_pictures": len(sizes) - len(there),
    }
    measured: dict[str, list[float]] = {
        "width": [width for width, _ in there],
        "height": [height for _, height in there],
        "aspect_ratio": [width / height for width, height in there],
        "characters": [sum(len(turn.text) for turn in sample.turns) for sample in chosen if sample.turns],
    }
    if model is not None:
        measured["tokens"] = _tokens(chosen, model)
    found |= {name: _spread(values) for name, values in measured.items()}
    answers = Counter(_answer(sample) for sample in samples)
    answers.pop("", None)
    found["different_answers"] = len(answers)
    found["answers"] = dict(answers.most_common(COMMON))
    if loaded.columns is not None and loaded.columns.label:
        found["classes"] = dict(answers.most_common())
        found["largest_to_smallest_class"] = max(answers.values()) / min(answers.values())
    if html is not None:
        _write_page(Path(html), found, measured, answers)
    return found


def _write_page(path: Path, found: dict[str, Any], measured: dict[str, list[float]], answers: Counter[str]) -> None:
    facts = [(name, value) for name, value in found.items() if isinstance(value, int | float | str)]
    charts = [(name, histogram(values, title=name, x_label=name)) for name, values in measured.items()]
    counts = {
        "media per row": found["media_per_row"],
        "classes" if "classes" in found else "answers": answers,
    }
    charts += [
        (name, bars({str(key): count for key, count in one.items()}, title=name)) for name, one in counts.items()
    ]
    shown = [(name.replace("_", " "), Markup(chart)) for name, chart in charts if chart]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmft.evaluation"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    page = environment.get_template("stats.html.j2").render(
        title=f"Statistics of {path.stem}", facts=facts, charts=shown
    )
    path.write_text(page, encoding="utf-8")


def _load(data: str | Path, media_root: str | Path | None) -> Loaded:
    root = str(media_root) if media_root is not None else None
    return load_samples(DataSource(path=str(data), media_root=root), seed=0)


def _size(ref: Any) -> tuple[int, int] | None:
    try:
        return image_size(ref, max_pixels=MAX_PIXELS)
    except DataError:
        return None


def _answer(sample: Sample) -> str:
    label = next((cell.value for cell in sample.cells.values() if cell.kind == "label"), None)
    return str(label) if label is not None else next(iter(sample.references), "")


def _tokens(samples: Sequence[Sample], model: str) -> list[float]:
    from mmft.backbones.load import load_processor
    from mmft.data.render import Renderer
    from mmft.recipe.schema import ModelSection

    renderer = Renderer(load_processor(ModelSection(name_or_path=model)), max_length=10**9)
    return [renderer.length(sample) for sample in samples if sample.turns]


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, (50, 90, 99), method="inverted_cdf")
    found = {"mean": np.mean(values), "min": min(values), "p50": p50, "p90": p90, "p99": p99, "max": max(values)}
    return {name: round(float(value), 3) for name, value in found.items()}
