"""Rows and files that are not what they say, or that would never end to be read: each is told, none passes."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmft
from mmft.data.clean import write_clean
from mmft.errors import DataError
from tests.data.spoilt import encoded, picture

TURNS = b'"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]'


@pytest.fixture(autouse=True)
def no_waiting():
    """A read that waits (of a pipe, say) fails instead of hanging."""

    def stop(*_: object) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def found(folder: Path, lines: list[bytes], **how) -> dict[int, tuple[str, str]]:
    """Line -> (cause, reason) of the bad rows that `mmft check` lists."""
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    mmft.check(path, out=folder / "bad.jsonl", workers=0, quiet=True, **how)
    rows = map(json.loads, (folder / "bad.jsonl").read_text().splitlines()) if (folder / "bad.jsonl").exists() else ()
    return {int(row["where"].rpartition(":")[2]): (row["cause"], row["reason"]) for row in rows}


LINES = {
    "the first of two keys": (b"{" + TURNS + b", " + TURNS + b"}", "json", "the key 'messages' is given twice"),
    "a key twice deep down": (b'{"tags": {"a": 1, "a": 2}, ' + TURNS + b"}", "json", "'a' is given twice"),
    "half a surrogate in the id": (rb'{"id": "\udfff", ' + TURNS + b"}", "json", "half a surrogate pair"),
    "half a surrogate in a tag": (rb'{"tags": {"\uD812": "x"}, ' + TURNS + b"}", "json", "half a surrogate pair"),
    "half a surrogate in an answer": (rb'{"answers": ["\ud800"], ' + TURNS + b"}", "json", "half a surrogate pair"),
    "NaN": (b'{"answers": [NaN], ' + TURNS + b"}", "empty_answer", "an answer is nan"),
    "a number that is infinite": (b'{"answers": [1e999], ' + TURNS + b"}", "empty_answer", "an answer is inf"),
    "an answer of U+200B": (TURNS.join((b"{", b"}")).replace(b'"a"', rb'"\u200b \u2060"'), "empty_answer", "is empty"),
    "5,000 digits": (b'{"id": ' + b"9" * 5000 + b", " + TURNS + b"}", "json", "4300 digits"),
    "lists 100,000 deep": (b"[" * 100_000, "json", "recursion"),
    "UTF-16": ("{}".encode("utf-16"), "json", "not UTF-8"),
    "NUL bytes": (b"\0" * 40, "json", "broken JSON"),
    "a byte order mark in the middle": (b"\xef\xbb\xbf{" + TURNS + b"}", "json", "BOM"),
    "no picture": (b'{"images": [null], ' + TURNS.replace(b'"q"', b'"<image> q"') + b"}", "missing_file", "is missing"),
    "a number for a picture": (b'{"images": 5, ' + TURNS.replace(b'"q"', b'"<image> q"') + b"}", "other", "a int"),
    "a picture of 0 bytes": (
        b'{"images": ["data:image/png;base64,"], ' + TURNS.replace(b'"q"', b'"<image> q"') + b"}",
        "truncated",
        "0 bytes",
    ),
}  # fmt: skip


def test_lines_that_say_something_else(tmp_path):
    good = [b"{" + TURNS.replace(b'"q"', f'"good {at}"'.encode()) + b"}" for at in range(25)]
    emoji = b'{"id": "\\ud83d\\ude00", ' + TURNS.replace(b'"q"', b'"a pair that is whole"') + b"}"
    seen = found(tmp_path, [*good, *(line for line, _, _ in LINES.values()), emoji])
    assert set(seen) == set(range(26, 26 + len(LINES)))
    for (name, (_, cause, reason)), (line, told) in zip(LINES.items(), sorted(seen.items()), strict=True):
        assert told[0] == cause and reason in told[1], (name, line, told)


def zipped(chunk: bytes) -> bytes:
    """A picture with one more chunk that grows to 200 MB when it is decompressed."""
    import struct
    import zlib

    body = chunk + b"k\0\0" + zlib.compress(bytes(200 << 20), 9)
    whole = encoded(picture(3))
    return whole[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + whole[33:]


PICTURES = {
    "a text that grows": (zipped(b"zTXt"), "corrupt_image"),
    "a profile that grows": (zipped(b"iCCP"), "corrupt_image"),
    "two pictures in one": (encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)]), "animated"),
    "an animated PNG": (encoded(picture(3), save_all=True, append_images=[picture(4)]), "animated"),
    "pages": (encoded(picture(5), "TIFF", save_all=True, append_images=[picture(6)]), "animated"),
    "LAB": (encoded(picture(7).convert("LAB"), "TIFF"), "cmyk"),
    "not a number": (encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "sixteen_bit"),
    "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "corrupt_image"),
    "a program for a printer": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "corrupt_image"),
}


def test_pictures_of_strange_kinds(tmp_path):
    lines = []
    for at, (data, _) in enumerate(PICTURES.values()):
        (tmp_path / f"{at}.png").write_bytes(data)
        asked = TURNS.replace(b'"q"', f'"<image> {at}"'.encode())
        lines.append(b'{"images": ["%d.png"], ' % at + asked + b"}")
    os.symlink("a.png", tmp_path / "b.png")
    os.symlink("b.png", tmp_path / "a.png")
    os.mkfifo(tmp_path / "fifo.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    for name in ("a.png", "fifo.png", "zero.png", ".", "a\\u0000b"):
        lines.append(b'{"images": ["%s"], ' % name.encode() + TURNS.replace(b'"q"', b'"<image>"') + b"}")
    seen = found(tmp_path, lines)
    assert [seen[at][0] for at in range(1, len(lines) + 1)] == [
        *(cause for _, cause in PICTURES.values()), "missing_file", "outside", "outside", "outside", "outside"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.tar", "d/rows.tar"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, name):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a regular file"):
        mmft.check(tmp_path / "d" if name.startswith("d/") else tmp_path / name, quiet=True)


def test_a_shard_that_was_cut_is_refused_wherever_it_was(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for number in range(4):
            data = b"{" + TURNS.replace(b'"q"', f'"{number}"'.encode()) + b"}"
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    path = tmp_path / "x.tar"
    path.write_bytes(out.getvalue())
    assert mmft.check(path, quiet=True)["rows"] == 4
    for size in (4096, 4095, 3072, 3000, 2700, 2560, 1024, 100):
        path.write_bytes(out.getvalue()[:size])
        with pytest.raises(DataError, match="broken tar file"):
            mmft.check(path, quiet=True)


def test_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer,answer\nq,a,b\n")
    with pytest.raises(DataError, match="the column 'answer' is given twice"):
        mmft.check(tmp_path / "a.csv", quiet=True)


def test_a_clean_copy_counts_lines_as_the_reader_does(tmp_path):
    """A lone carriage return ends no line."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":\r1}\n\n{bad\n{"b": 2}')
    assert write_clean(path, tmp_path / "out.jsonl", {f"{path}:3"}) == 2
    assert (tmp_path / "out.jsonl").read_bytes() == b'{"a":\r1}\n{"b": 2}\n'


def test_tokens_of_turns_in_texts_are_told(tmp_path):
    lines = [b"{" + TURNS.replace(b'"q"', b'"%s"' % text) + b"}" for text in (b"plain", b"x <end> y", b"<image> z")]
    seen = found(tmp_path, lines, model="shipped:nano-vlm")
    assert seen[2] == ("turn_tokens", "a text holds '<end>', a token that begins or ends a turn of this model")
    assert seen[3][0] == "placeholders" and 1 not in seen
