"""A `MediaRef` becomes some frames of a video: size and length checked in the header, the rest never kept.

Files go through PyAV (the extra `video`); folders and lists of pictures and animated GIF or WebP need Pillow only. A
file is opened as the container that its first bytes name, so that no playlist makes the decoder open other files.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from mmft.data.media import MAX_FILE_BYTES, frames_of, header, kind_of_bytes, media_name, open_bytes, open_image, to_rgb
from mmft.data.sample import MediaRef
from mmft.errors import DataError, MmftError

MAX_SECONDS = 600.0
MOST_FRAMES = 1024
"""Frames that one row may be asked for."""
_MOST_DECODED = 100_000
_CONTAINERS = ((4, b"ftyp", "mov"), (0, b"\x1aE\xdf\xa3", "matroska"), (8, b"AVI ", "avi"), (0, b"\0\0\1\xba", "mpeg"))


def open_video(
    ref: MediaRef,
    *,
    count: int | None = None,
    rate: float | None = None,
    max_pixels: int,
    max_seconds: float = MAX_SECONDS,
) -> list[Image.Image]:
    """Frames as 8-bit RGB: `count` of them, the middles of equal stretches (all where there are fewer), or `rate` per
    second (lists and folders of pictures have no clock and count as one frame per second).

    Raises DataError with the file's name for a video that leaves its root, is no video, is truncated or corrupt, has
    more than `max_pixels` in a frame or lasts longer than `max_seconds` (by its header, before decoding).
    """
    if (count is None) == (rate is None) or (count or 1) < 1 or (rate is not None and not rate > 0):
        raise ValueError("give count >= 1 or rate > 0")
    pictures = frames_of(ref)
    if pictures:
        chosen = chosen_frames([float(at) for at in range(len(pictures))], count=count, rate=rate)
        return [open_image(pictures[at], max_pixels=max_pixels) for at in chosen]
    with open_bytes(ref) as stream:
        head = stream.read(16)
        stream.seek(0)
        if not head:
            raise DataError(
                "the video is empty (0 bytes)", where=media_name(ref), do="replace the file or remove the row"
            )
        if kind_of_bytes(head) == "image":
            return _animation(ref, count=count, rate=rate, max_pixels=max_pixels, max_seconds=max_seconds)
        return _film(stream, head, media_name(ref), (count, rate), (max_pixels, max_seconds))


def chosen_frames(times: Sequence[float], *, count: int | None, rate: float | None) -> list[int]:
    """Which of the frames shown at `times` (rising) are taken: the middles of `count` equal stretches of frames, or
    the last frame shown at each k / rate from the first on. At most `MOST_FRAMES`."""
    total = len(times)
    if count is not None:
        return list(range(total)) if count >= total else [int((at + 0.5) * total / count) for at in range(count)]
    assert rate is not None
    chosen: list[int] = []
    wanted, at = times[0] if times else 0.0, 0
    while total and wanted <= times[-1] + 1e-9 and len(chosen) < MOST_FRAMES:
        while at + 1 < total and times[at + 1] <= wanted + 1e-9:
            at += 1
        chosen.append(at)
        wanted = times[0] + len(chosen) / rate
    return chosen


def _animation(
    ref: MediaRef, *, count: int | None, rate: float | None, max_pixels: int, max_seconds: float
) -> list[Image.Image]:
    """GIF, WebP and others that Pillow steps through; a still picture is a video of one frame."""
    with header(ref, max_pixels) as image:
        total, name = getattr(image, "n_frames", 1), media_name(ref)
        if total > _MOST_DECODED:
            raise _too_long(f"{total} frames", name, f"at most {_MOST_DECODED} frames")
        times, clock = [], 0.0
        for at in range(total):
            image.seek(at)
            if image.format == "WEBP":  # whose frames' durations are known once they are decoded
                image.load()
            times.append(clock)
            clock += max(float(image.info.get("duration", 0) or 0), 10.0) / 1000
            if clock > max_seconds:
                raise _too_long(f"more than {max_seconds:g} s", name, f"at most {max_seconds:g} s")
        wanted = chosen_frames(times, count=count, rate=rate)
        shown = {}
        for at in sorted(set(wanted)):
            image.seek(at)
            image.load()
            shown[at] = to_rgb(image)
        return [shown[at] for at in wanted]


def _film(
    stream: Any, head: bytes, name: str, choice: tuple[int | None, float | None], caps: tuple[int, float]
) -> list[Image.Image]:
    container = next((form for at, magic, form in _CONTAINERS if head[at : at + len(magic)] == magic), None)
    if container is None:
        raise DataError(
            "not a video that is read here",
            where=name,
            allowed="MP4, MOV, MKV, WebM, AVI, MPEG-PS, animated GIF or WebP, a folder or list of pictures",
            do="convert it to MP4",
        )
    try:
        import av
    except ImportError as error:
        raise DataError(
            "video files need PyAV, which is not installed",
            where=name,
            do="pip install 'mmft[video]', or give a folder of pictures",
        ) from error
    try:
        data = io.BytesIO(stream.read(MAX_FILE_BYTES + 1))
        with av.open(data, format=container, options={"protocol_whitelist": ""}) as file:
            return _taken(file, name, choice, caps)
    except MmftError:
        raise
    except (av.FFmpegError, ValueError, OSError, ArithmeticError) as error:
        raise _corrupt(f"{type(error).__name__}: {error}", name) from error


def _taken(file: Any, name: str, choice: tuple[int | None, float | None], caps: tuple[int, float]) -> list[Image.Image]:
    max_pixels, max_seconds = caps
    if not file.streams.video:
        raise DataError("the file has no pictures", where=name, do="declare it as audio, or remove the row")
    track = file.streams.video[0]
    if track.codec_context is None:
        raise _corrupt("its codec is not known", name)
    if track.width * track.height < 1:
        raise _corrupt("its frames have no size; it may be truncated", name)
    if track.width * track.height > max_pixels:
        raise DataError(
            f"the frames are {track.width} x {track.height}",
            where=name,
            allowed=f"at most {max_pixels} pixels (data.max_image_pixels)",
            do="scale the video down",
        )
    lasts = [float(track.duration * track.time_base)] if track.duration and track.time_base else []
    lasts += [file.duration / 1e6] if file.duration else []
    if lasts and max(lasts) > max_seconds:
        raise _too_long(f"{max(lasts):.1f} s", name, f"at most {max_seconds:g} s")
    times = sorted(_times(file, track, name, max_seconds))
    if not times:
        raise _corrupt("it has no frames", name)
    if file.format.name.startswith("mov") and len(times) < track.frames:
        raise _corrupt(f"it is truncated: {len(times)} of {track.frames} frames are there", name)
    wanted = chosen_frames(times, count=choice[0], rate=choice[1])
    file.seek(0)
    last, shown = max(wanted), {}
    places = set(wanted)
    for at, frame in enumerate(file.decode(track)):
        if frame.width * frame.height > max_pixels:
            raise _corrupt(f"frame {at} is {frame.width} x {frame.height}", name)
        if at in places:
            shown[at] = frame.to_image().convert("RGB")
        if at >= last:
            break
    if len(shown) < len(places):
        raise _corrupt(f"only {max(shown, default=-1) + 1} of {len(times)} frames can be decoded", name)
    return [shown[at] for at in wanted]


def _times(file: Any, track: Any, name: str, max_seconds: float) -> Iterator[float]:
    """When each frame is shown, from the packets, nothing decoded."""
    base = float(track.time_base or 0)
    for at, packet in enumerate(file.demux(track)):
        if packet.size == 0:  # the flush at the end
            continue
        if at > _MOST_DECODED:
            raise _too_long(f"more than {_MOST_DECODED} frames", name, f"at most {_MOST_DECODED} frames")
        shown = packet.pts if packet.pts is not None else packet.dts
        seconds = float(at) if shown is None else shown * base
        if not math.isfinite(seconds) or abs(seconds) > max_seconds + 86400:
            raise _corrupt(f"frame {at} stands at {seconds} s", name)
        yield seconds


def _too_long(what: str, where: str, allowed: str) -> DataError:
    return DataError(f"the video has {what}", where=where, allowed=allowed, do="cut it, or remove the row")


def _corrupt(what: str, where: str) -> DataError:
    return DataError(f"the video cannot be read: {what}", where=where, do="replace the file or remove the row")
