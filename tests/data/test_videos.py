"""Videos: which frames are taken, from files, folders, lists and animations; what is refused."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmft.data.media import frames_of, media_digest
from mmft.data.sample import MediaRef
from mmft.data.videos import chosen_frames, open_video
from mmft.errors import DataError

CAPS = {"max_pixels": 1_000_000}


def grey(level: int, size=(32, 24)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def film(frames: int = 20, *, rate: int = 10, form: str = "mp4", size=(32, 24)) -> bytes:
    """Frame k is grey of level 10 k."""
    av = pytest.importorskip("av", reason="needs the extra 'video'")
    path = tempfile.mkstemp()[1]  # a file: the index of an MP4 is moved to its front by reading it again
    options = {"movflags": "faststart"} if form == "mp4" else {}
    with av.open(path, "w", format=form, options=options) as file:
        track = file.add_stream("mpeg4" if form in ("mp4", "avi") else "libvpx", rate=rate)
        track.width, track.height, track.pix_fmt = *size, "yuv420p"
        for at in range(frames):
            picture = np.full((size[1], size[0], 3), 10 * at % 250, np.uint8)
            file.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(track.encode())
    data = Path(path).read_bytes()
    os.unlink(path)
    return data


def levels(pictures) -> list[int]:
    return [round(np.asarray(one).mean() / 10) for one in pictures]


def test_which_frames():
    times = [k / 10 for k in range(20)]
    assert chosen_frames(times, count=4, rate=None) == [2, 7, 12, 17]
    assert chosen_frames(times, count=50, rate=None) == list(range(20))
    assert chosen_frames(times, count=None, rate=2) == [0, 5, 10, 15]
    assert chosen_frames([0.0, 0.1, 3.0], count=None, rate=1) == [0, 1, 1, 2]
    assert chosen_frames([], count=None, rate=1) == []
    assert len(chosen_frames([0.0, 1e9], count=None, rate=100)) == 1024


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
def test_frames_of_a_file_by_count_and_by_rate(form):
    ref = MediaRef("video", data=film(form=form))
    assert levels(open_video(ref, count=4, **CAPS)) == [2, 7, 12, 17]
    assert levels(open_video(ref, rate=2, **CAPS)) == [0, 5, 10, 15]
    assert len(open_video(ref, count=100, **CAPS)) == 20
    assert open_video(ref, count=1, **CAPS)[0].mode == "RGB"


def test_folders_and_lists_of_pictures(tmp_path):
    (tmp_path / "clip").mkdir()
    for at in range(12):
        grey(10 * at).save(tmp_path / "clip" / f"{at}.png")
    (tmp_path / "clip" / "notes.txt").write_text("x")
    folder = MediaRef("video", path="clip", root=tmp_path)
    assert levels(open_video(folder, count=12, **CAPS)) == list(range(12))  # 2.png before 10.png
    listed = MediaRef("video", frames=tuple(MediaRef(path=f"clip/{at}.png", root=tmp_path) for at in (3, 1, 2)))
    assert levels(open_video(listed, count=3, **CAPS)) == [3, 1, 2]
    assert levels(open_video(listed, rate=1, **CAPS)) == [3, 1, 2]
    assert media_digest(folder) != media_digest(listed) == media_digest(listed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        open_video(MediaRef("video", path="empty", root=tmp_path), count=1, **CAPS)


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_animations_need_no_library(form):
    out = io.BytesIO()
    grey(0).save(
        out, form, save_all=True, append_images=[grey(10 * k) for k in range(1, 10)], duration=100, lossless=True
    )
    ref = MediaRef("video", data=out.getvalue())
    assert levels(open_video(ref, count=5, **CAPS)) == [1, 3, 5, 7, 9]
    assert levels(open_video(ref, rate=5, **CAPS)) == [0, 2, 4, 6, 8]
    with pytest.raises(DataError, match=r"more than 0.5 s"):
        open_video(ref, count=2, max_seconds=0.5, **CAPS)


def test_a_video_stays_below_its_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out").mkdir()
    grey(1).save(tmp_path / "out" / "1.png")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "out")
    for path in ("../out", "link", str(tmp_path / "out"), "http://example.org/a.mp4"):
        with pytest.raises(DataError, match="path"):
            frames_of(MediaRef("video", path=path, root=tmp_path / "root"))


def test_a_playlist_opens_nothing(tmp_path):
    """ffmpeg would open the files that an HLS, concat or SDP file names."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(film(4))
    for text in (f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n", f"ffconcat version 1.0\nfile {secret}\n"):
        (tmp_path / "list.mp4").write_text(text)
        with pytest.raises(DataError, match="not a video that is read here"):
            open_video(MediaRef("video", path="list.mp4", root=tmp_path), count=1, **CAPS)


@pytest.mark.parametrize(
    ("make", "caps", "text"),
    [
        (lambda: b"x", {}, "not a video"),
        (lambda: film()[:-600], {}, "truncated|cannot be read"),
        (lambda: film()[:40], {}, "cannot be read|no pictures"),
        (lambda: film(20), {"max_seconds": 1.0}, r"2.0 s[\s\S]*at most 1 s"),
        (lambda: film(20), {"max_pixels": 100}, "32 x 24"),
    ],
)
def test_bad_videos_are_refused(make, caps, text):
    with pytest.raises(DataError, match=text):
        open_video(MediaRef("video", data=make()), count=4, **{**CAPS, **caps})
    with pytest.raises(DataError, match="empty"):
        open_video(MediaRef("video", data=b""), count=4, **CAPS)


def test_damaged_bytes_never_crash():
    whole = film(12)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 20):
            data[at] = rng.integers(0, 256)
        try:
            found = open_video(MediaRef("video", data=bytes(data)), count=3, **CAPS)
        except DataError:
            continue
        assert len(found) in range(1, 4)
