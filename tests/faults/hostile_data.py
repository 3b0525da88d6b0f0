"""F9 to F12: bad rows, paths that lead out, decompression bombs, addresses to be fetched."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from tests.faults.trial import Fault, Tally, answer, expect, finish, recipe, run_of, train

# ---------------------------------------------------------------- bad rows


def bad_rows(tally: Tally, count: int) -> None:
    """F9: `count` rows, one in 100 of them bad in 20 ways: found exactly, cut out, the rest in one order, the cap."""
    each = max(1, count // 2000)
    place = tally.place("rows")

    def look() -> dict[str, Any]:
        import mmft
        from tests.data import small, spoilt

        small.processor().save_pretrained(place / "model")
        wanted = spoilt.make(place / "data", rows=count, of_each=each)
        import mmft.checking

        mmft.checking.load_processor = lambda _: small.processor()
        found = mmft.check(
            [place / "data" / "train.jsonl"],
            model="small",
            out=place / "bad.jsonl",
            fix=place / "clean.jsonl",
            against=[place / "data" / "eval.jsonl"],
            workers=2,
            quiet=True,
            max_length=2000,
        )
        rows = [json.loads(line) for line in (place / "bad.jsonl").read_text().splitlines()]
        seen = {row["where"].rsplit(":", 1)[1]: row["cause"] for row in rows}
        os.replace(place / "clean.jsonl", place / "data" / "clean.jsonl")
        return {"wanted": wanted, "seen": seen, "bad": found["bad"], "told": all(row["reason"] for row in rows)}

    seen = answer(look, tally.folder, seconds=900)
    with tally.trial("exactly the bad rows", weight=len(seen["wanted"])):
        expect(seen["wanted"] == seen["seen"], f"{len(seen['seen'])} found of {len(seen['wanted'])}")
        expect(seen["told"], "a reason is missing")

    def orders() -> dict[str, list[Any]]:
        from mmft.data.formats import load_samples
        from mmft.data.loader import batches
        from mmft.data.order import StepPlan
        from mmft.data.render import Renderer
        from mmft.recipe.schema import DataSource
        from tests.data import small

        rows = load_samples(DataSource(path=str(place / "data" / "clean.jsonl")), seed=0).samples
        plan = StepPlan(rows=len(rows), micro_batch=10, micro_per_step=1)
        renderer = Renderer(small.processor(), max_length=4096)
        found: dict[str, list[Any]] = {}
        for workers in (0, 2):
            stream = batches(
                rows, renderer, plan, start_step=0, stop_step=len(rows) // 10, rank=0, workers=workers, pad_token_id=0
            )
            found[str(workers)] = [batch.ids for step in stream for batch in step]
        found["rows"] = [len(rows)]
        return found

    order = answer(orders, tally.folder, seconds=900)
    with tally.trial("the same order for 0 and 2 workers"):
        expect(order["rows"][0] == count - len(seen["wanted"]), f"{order['rows'][0]} rows are left")
        expect(order["0"] == order["2"], "the orders differ")
    _cap(tally, count)


def _cap(tally: Tally, count: int) -> None:
    """A share of 1 % passes, one row more stops before step 1."""
    for more in (0, 1):
        place = tally.place(f"cap{more}")
        lines = [json.dumps({"question": f"q {n}", "answer": "a"}) for n in range(count)]
        for at in tally.draw.sample(range(20, count), count // 100 + more):
            lines[at] = lines[at][:-3]
        (place / "rows.jsonl").write_text("\n".join(lines) + "\n")

        def read(place: Path = place) -> dict[str, Any]:
            from mmft.data.formats import load_samples
            from mmft.recipe.schema import DataSource

            begin = time.process_time()
            loaded = load_samples(DataSource(path=str(place / "rows.jsonl")), seed=0)
            return {"good": len(loaded.samples), "bad": len(loaded.bad), "seconds": time.process_time() - begin}

        with tally.trial(f"{count // 100 + more} bad of {count}"):
            seen = answer(read, tally.folder)
            expect(seen["bad"] == count // 100 + more, f"{seen['bad']} were found")
            tally.measure(1e6 * seen["seconds"] / count)
            if count >= 10_000:
                expect(count / seen["seconds"] >= 20_000, f"{count / seen['seconds']:.0f} lines a second")
            data = [{"path": str(place / "rows.jsonl"), "format": "qa"}]
            values = recipe(tally, {"data.train": data, "data.max_bad_fraction": 0.01, "train.max_steps": 1})
            code = finish(train(values, place), place / "log", seconds=600)
            text = (place / "log").read_text()
            if more:
                expect(code == 3 and f"{count // 100 + 1} of {count} rows" in text, f"exit {code}: {text[-400:]}")
                expect(not (run_of(place) / "metrics.jsonl").exists(), "a step was taken")
            else:
                expect(code == 0, f"exit {code}: {text[-400:]}")
                events = (run_of(place) / "events.jsonl").read_text()
                expect('"bad_rows"' in events, "the bad rows are not listed")


# ---------------------------------------------------------------- paths


def escapes(tally: Tally, count: int) -> None:
    """F10: hostile paths in rows of a real file; an audit hook sees what is opened."""
    from tests.test_files import HOSTILE

    plain = [value for value in HOSTILE if isinstance(value, str) and value not in ("", ".", "sub")]
    values = [value for value in plain if not value.startswith("data:")][:count]  # a data: URI is a picture, no path
    for value in values:
        with tally.trial(repr(value)[:40]):
            seen = answer(lambda value=value: _escape(tally.folder, value), tally.folder, seconds=30)  # type: ignore[misc]
            expect(len(seen["bad"]) == 1 and seen["good"] == 0, f"it was taken: {seen}")
            where, reason = seen["bad"][0]
            expect(where.endswith("rows.jsonl:1") and bool(reason), f"line and reason are not told: {where} {reason}")
            expect(not seen["opened"], f"opened: {seen['opened'][:3]}")
            expect(seen["seconds"] < 1.0, f"{seen['seconds']:.2f} s")
            tally.measure(seen["seconds"])


def _escape(folder: Path, value: str) -> dict[str, Any]:
    import shutil

    from mmft.data.formats import load_samples
    from mmft.data.media import media_digest, open_image
    from mmft.data.sample import MediaRef
    from mmft.errors import DataError
    from mmft.recipe.schema import DataSource

    top = folder / "tree"
    shutil.rmtree(top, ignore_errors=True)
    root, evil = top / "root", top / "root_evil"
    (root / "sub").mkdir(parents=True)
    evil.mkdir()
    for path in (root / "a.png", evil / "x.png", top / "out.png"):
        path.write_bytes(b"x")
    for name, target in (
        ("link.png", top / "out.png"),
        ("linkdir", evil),
        ("loop", root / "loop"),
        ("zero", "/dev/zero"),
    ):
        (root / name).symlink_to(target)
    os.mkfifo(root / "pipe")
    value = value.replace("TMP", str(top)).replace("ROOT", str(root))
    lines = [{"image": value, "question": "q", "answer": "a"}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    opened: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = os.path.realpath(os.fsdecode(arguments[0]))
            inside = name.startswith(str(root) + os.sep) or name.endswith((".py", ".pyc", ".so"))
            if not inside or name == str(root / "pipe"):
                opened.append(name)

    sys.addaudithook(hook)
    begin = time.monotonic()
    try:
        loaded = load_samples(DataSource(path=str(root / "rows.jsonl"), format="qa"), seed=0)
        bad, good = loaded.bad, len(loaded.samples)
    except DataError as error:  # a text that is none: no row of the file can be read
        bad, good = [(problem.where or "", problem.what) for problem in error.problems[1:]], 0
    ref = MediaRef(path=value, root=str(root))
    for reader in (media_digest, lambda ref: open_image(ref, max_pixels=10**6)):
        try:
            reader(ref)
            opened.append(value)
        except (DataError, ValueError):
            pass
    return {
        "bad": bad,
        "good": good,
        "opened": opened,
        "seconds": time.monotonic() - begin,
    }


# ---------------------------------------------------------------- bombs


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *more: bytes, bits: int = 1, color: int = 0, body: bytes = b"") -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(more)
        + _chunk(b"IDAT", body or zlib.compress(bytes(1000)))
        + _chunk(b"IEND", b"")
    )


def bombs() -> dict[str, bytes]:
    """Small files that want to become large."""
    from PIL import Image

    found: dict[str, bytes] = {}
    rows = zlib.compress(bytes((13_000 // 8 + 1) * 13_000), 9)
    found["169 million pixels in a PNG"] = _png(13_000, 13_000, body=rows)
    found["60,000 x 60,000 in a header"] = _png(60_000, 60_000, bits=8, color=2)
    found["two thousand million pixels wide"] = _png(2**31 - 1, 1)
    text = zlib.compress(bytes(300 << 20), 9)
    found["300 MB of text in a chunk"] = _png(8, 8, _chunk(b"iTXt", b"a\0\1\0\0\0" + text))
    found["300 MB of zTXt"] = _png(8, 8, _chunk(b"zTXt", b"a\0\0" + text))
    found["300 MB of colour profile"] = _png(8, 8, _chunk(b"iCCP", b"a\0\0" + text))
    gif = io.BytesIO()
    Image.new("P", (1, 1)).save(gif, "GIF")
    frame = gif.getvalue()[gif.getvalue().index(b",", 6) : -1]
    found["a GIF of 30,000 frames"] = gif.getvalue()[:-1] + frame * 30_000 + b";"
    found["a GIF screen of 65,535 x 65,535"] = b"GIF89a\xff\xff\xff\xff" + gif.getvalue()[10:]
    found["a WebP canvas of 16,384 x 16,384"] = (
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0\xff\x3f\0\xff\x3f\0"
    )
    tags = [
        (256, 4, 100_000),
        (257, 4, 100_000),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, 100_000),
        (279, 4, 16),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    found["a TIFF of 10,000 million pixels"] = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    loop = struct.pack("<HHII", 34665, 4, 1, 8)
    found["a TIFF whose directory points at itself"] = b"II*\0" + struct.pack("<IH", 8, 1) + loop + struct.pack("<I", 8)
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    found["a JPEG that is cut"] = jpeg.getvalue()[: len(jpeg.getvalue()) // 2]
    frame_at = jpeg.getvalue().index(b"\xff\xc0")
    found["a JPEG header of 65,500 x 65,500"] = (
        jpeg.getvalue()[: frame_at + 5] + struct.pack(">HH", 65_500, 65_500) + jpeg.getvalue()[frame_at + 9 :]
    )
    found["a bitmap of 2,147,483,647 x 1"] = (
        b"BM" + struct.pack("<IHHIIiiHHIIIIII", 70, 0, 0, 54, 40, 2**31 - 1, 1, 1, 24, 0, 16, 0, 0, 0, 0) + bytes(16)
    )
    return found


def explode(tally: Tally, count: int) -> None:
    """F11: each is refused (or read small) with little memory and time."""
    made = tally.place("bombs")

    def write() -> list[str]:
        found = bombs()
        for number, data in enumerate(found.values()):
            (made / f"{number}.png").write_bytes(data)
        return list(found)

    names = answer(write, tally.folder)
    for number, name in list(enumerate(names))[:count]:
        with tally.trial(name):
            seen = answer(lambda number=number: _explode(made, number), tally.folder, seconds=60)  # type: ignore[misc]
            expect(seen["grown"] < 50, f"{seen['grown']:.0f} MB")
            expect(seen["seconds"] < 0.05 or seen["cpu"] < 0.05, f"{1000 * seen['cpu']:.0f} ms of processor time")
            expect(seen["small"] or seen["refused"], "it was decoded")
            tally.measure(seen["grown"])


def _explode(folder: Path, number: int) -> dict[str, Any]:
    import resource

    from mmft.data.media import image_size, open_image
    from mmft.data.sample import MediaRef
    from mmft.errors import DataError

    ref, refused, small = MediaRef(path=f"{number}.png", root=str(folder)), False, False
    from PIL import Image

    Image.init()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, cpu = time.monotonic(), time.process_time()
    try:
        image_size(ref, max_pixels=40_000_000)
        picture = open_image(ref, max_pixels=40_000_000)
        small = picture.size[0] * picture.size[1] < 10_000
    except DataError:
        refused = True
    return {
        "refused": refused,
        "small": small,
        "seconds": time.monotonic() - begin,
        "cpu": time.process_time() - cpu,
        "grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


# ---------------------------------------------------------------- addresses


def addresses(port: int) -> list[str]:
    """One server under many names."""
    hosts = (
        "127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.1.",
        "user@127.0.0.1", "[::ffff:127.0.0.1]", "LOCALHOST",
    )  # fmt: skip
    found = [f"http://{host}:{port}/a.png" for host in hosts]
    found += [f"HTTP://127.0.0.1:{port}/a.png", f"//127.0.0.1:{port}/a.png", f"ftp://127.0.0.1:{port}/a.png"]
    found += [f"https://127.0.0.1:{port}/a.png", f"http:127.0.0.1:{port}/a.png", "http://169.254.169.254/latest"]
    return [*found, f" http://127.0.0.1:{port}/a.png", f"http:\\\\127.0.0.1:{port}\\a.png", f"s3://127.0.0.1:{port}/a"]


def fetches(tally: Tally, count: int) -> None:
    """F12: addresses as images of rows of every dialect, in data, in an answer: a canary server sees no connection."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(64)
    server.settimeout(0.1)
    port = server.getsockname()[1]
    seen: list[str] = []
    dialects = {
        "qa": lambda url: {"image": url, "question": "q", "answer": "a"},
        "messages": lambda url: {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "q"}],
                },
                {"role": "assistant", "content": "a"},
            ]
        },
        "llava": lambda url: {
            "image": url,
            "conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}],
        },
    }
    pairs = [(url, name) for url in addresses(port) for name in dialects]
    if count < len(pairs):
        pairs = tally.draw.sample(pairs, count)

    def ask(url: str, name: str) -> dict[str, Any]:
        from mmft.data.formats import load_samples
        from mmft.data.media import open_image
        from mmft.errors import DataError
        from mmft.recipe.schema import DataSource

        path = tally.folder / "rows.jsonl"
        path.write_text(json.dumps(dialects[name](url)) + "\n")
        loaded = load_samples(DataSource(path=str(path), format=name), seed=0)
        opened = 0
        for sample in loaded.samples:
            for ref in sample.media:
                try:
                    open_image(ref, max_pixels=10**6)
                    opened += 1
                except DataError:
                    pass
        return {"bad": len(loaded.bad), "opened": opened}

    for url, name in pairs:
        with tally.trial(f"{url} as {name}"):
            found = answer(lambda url=url, name=name: ask(url, name), tally.folder, seconds=20)  # type: ignore[misc]
            expect(found["bad"] == 1, "the row was taken")
            try:
                server.settimeout(0.0)
                server.accept()
                seen.append(url)
            except OSError:
                pass
            expect(not seen, f"the canary was called: {seen}")
    server.close()
    tally.notes.append("nothing is ever fetched: mmft has no allow-list of hosts")


FAULTS = (
    Fault("F9", "10,000 rows, 100 bad of 20 kinds; order; the cap of 1 %", 10_000, 400, "us to read a line", bad_rows),
    Fault("F10", "paths out of the media root", 60, 12, "s", escapes),
    Fault("F11", "decompression bombs", 20, 20, "MB more", explode),
    Fault("F12", "addresses in rows: nothing is fetched", 100, 12, "", fetches),
)
MUTANTS = (
    (
        "F9",
        "mmft/data/formats.py",
        "loaded.bad_fraction <= max_bad_fraction",
        "loaded.bad_fraction <= 2 * max_bad_fraction",
    ),
    ("F10", "mmft/paths.py", "if not path.is_relative_to(base):", "if not str(path).startswith(str(base)):"),
    ("F11", "mmft/data/media.py", "if width * height > max_pixels:", "if width > max_pixels:"),
    (
        "F12",
        "mmft/paths.py",
        "    if _SCHEME.match(relative):",
        "    if _SCHEME.match(relative) and __import__('urllib.request').request.urlopen(relative, timeout=1):",
    ),
)
