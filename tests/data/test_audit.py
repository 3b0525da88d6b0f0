"""Counts and fingerprints of a data set, and the preview page."""

from __future__ import annotations

import dataclasses
import re

import pytest

from mmft.data.audit import audit, fingerprint
from mmft.data.preview import chips, write_preview
from mmft.data.render import IGNORED, Renderer
from mmft.data.sample import MediaRef, Piece, Turn
from tests.data.small import CHATML, LLAVA15, encoded, picture, processor, sample

ROWS = [sample("Where is the dog? " * (k + 1), "top left", seed=k, images=k % 2, id=f"r{k}") for k in range(20)]


def test_counts():
    renderer = Renderer(processor("llava"), max_length=4096)
    found = audit(ROWS, renderer)
    rendered = [renderer.render(row) for row in ROWS]
    totals = sorted(len(row.input_ids) for row in rendered)
    assert (found.rows, found.media, found.measured, found.dropped, found.unstopped) == (20, 10, 20, (), 0)
    assert found.lengths["total"]["max"] == totals[-1] and found.lengths["total"]["p50"] == totals[9]
    assert found.lengths["media"]["mean"] == sum(row.media_tokens for row in rendered) / 20
    assert found.lengths["supervised"]["min"] == min(int((row.labels != IGNORED).sum()) for row in rendered)
    assert audit(ROWS, renderer, limit=5).measured == 5


def test_dropped_rows_are_the_long_ones():
    wide = Renderer(processor("llava"), max_length=4096)
    lengths = {row.id: len(wide.render(row).input_ids) for row in ROWS}
    renderer = Renderer(processor("llava"), max_length=80, over_length="drop")
    found = audit(ROWS, renderer)
    assert found.dropped == tuple(name for name, length in lengths.items() if length > 80) != ()
    assert found.measured == 20 - len(found.dropped) and found.lengths["total"]["max"] <= 80


def test_a_template_without_an_end_is_seen():
    assert audit(ROWS, Renderer(processor("llava", LLAVA15), max_length=4096)).unstopped == 20
    assert audit(ROWS, Renderer(processor("llava", CHATML), max_length=4096)).unstopped == 0


def test_fingerprint_sees_every_change(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    base = dataclasses.replace(ROWS[1], media=(MediaRef(path="a.png", root=tmp_path),))
    first = fingerprint([base, ROWS[0]])
    assert first == fingerprint([base, ROWS[0]])
    assert first == fingerprint([dataclasses.replace(base, where="elsewhere:3"), ROWS[0]])
    changed = [
        [ROWS[0], base],
        [base],
        [dataclasses.replace(base, id="other"), ROWS[0]],
        [dataclasses.replace(base, answers=("x",)), ROWS[0]],
        [dataclasses.replace(base, tags={"a": "b"}), ROWS[0]],
        [dataclasses.replace(base, turns=(*base.turns[:-1], Turn("assistant", (Piece("text", "top lefT"),)))), ROWS[0]],
    ]
    (tmp_path / "a.png").write_bytes(encoded(picture(1)))
    seen = {first, fingerprint([base, ROWS[0]])}
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    seen |= {fingerprint(rows) for rows in changed}
    assert len(seen) == len(changed) + 2


@pytest.mark.parametrize("kind", ["llava", "idefics3", "mllama"])
def test_the_preview_escapes_everything(tmp_path, kind):
    evil = "<script>alert(1)</script>{{ 1234*4321 }}"
    row = dataclasses.replace(sample(evil, "a cat", id=evil), where=f"{evil}.jsonl:1")
    proc = processor(kind)
    path = write_preview([row, ROWS[1]], Renderer(proc, max_length=4096), proc, tmp_path / "preview.html", rows=5)
    page = path.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "5332114" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert 'class="t trained"' in page and "image token" in page


def test_chips_tell_trained_from_read():
    proc = processor("llava")
    rendered = Renderer(proc, max_length=4096).render(sample("What is it?", "a cat"))
    found = chips(rendered, proc)
    assert [chip.text for chip in found if chip.kind == "media"] == ["36 image tokens"]
    assert "".join(chip.text for chip in found if chip.kind == "trained") == "a cat<|im_end|>"
