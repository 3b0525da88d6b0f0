"""The media of a conversation, opened in their order, and handed to a processor under the names it knows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmft.data.media import image_size, open_image
from mmft.data.sample import MediaKind, MediaRef
from mmft.data.sounds import audio_seconds, open_audio
from mmft.data.videos import open_video
from mmft.errors import DataError

Opened = Image.Image | np.ndarray | list[Image.Image]
"""A picture, the samples of a sound, or the frames of a video."""
Measure = tuple[MediaKind, int, int, int]
"""All that decides how many tokens a medium becomes: kind, width, height, and number of frames or samples."""
_PARTS: dict[MediaKind, str] = {"image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}


class MediaOpener:
    """Opens what a processor can take. `video_frames` are taken from each video, the middles of equal stretches.

    Sounds become mono at the rate of the processor's feature extractor; frames go in as they are chosen here
    (`do_sample_frames=False`).
    """

    def __init__(self, processor: Any, *, max_pixels: int, video_frames: int) -> None:
        self.max_pixels, self.video_frames = max_pixels, video_frames
        # a plain image processor or tokenizer takes pictures, if anything
        self.kinds = tuple(
            kind for kind, part in _PARTS.items() if kind == "image" or getattr(processor, part, None) is not None
        )
        self.sampling_rate = int(getattr(getattr(processor, "feature_extractor", None), "sampling_rate", 16000))

    def open(self, ref: MediaRef) -> Opened:
        """Raises DataError for a medium the processor cannot take, and what the readers of each kind raise."""
        self._check(ref)
        if ref.kind == "audio":
            return open_audio(ref, sampling_rate=self.sampling_rate)
        if ref.kind == "video":
            return open_video(ref, count=self.video_frames, max_pixels=self.max_pixels)
        return open_image(ref, max_pixels=self.max_pixels)

    def measure(self, ref: MediaRef) -> Measure:
        """`measure_of` the opened medium, from headers; only a video is decoded for it."""
        self._check(ref)
        if ref.kind == "audio":
            samples = round(audio_seconds(ref) * self.sampling_rate, 6)
            return ("audio", 0, 0, math.ceil(samples))
        if ref.kind == "video":
            return measure_of(self.open(ref))
        return ("image", *image_size(ref, max_pixels=self.max_pixels), 1)

    def _check(self, ref: MediaRef) -> None:
        if ref.kind not in self.kinds:
            raise DataError(
                f"the model's processor takes no {ref.kind}",
                allowed=", ".join(self.kinds),
                do="choose a model that does, take the row out, or give a video's frames as pictures",
            )

    def keywords(self, media: Sequence[Opened]) -> dict[str, Any]:
        """What a processor's call takes beside the text."""
        pictures = [one for one in media if isinstance(one, Image.Image)]
        sounds = [one for one in media if isinstance(one, np.ndarray)]
        videos = [one for one in media if isinstance(one, list)]
        found: dict[str, Any] = {"images": [pictures]} if pictures else {}
        if sounds:
            found |= {"audio": sounds, "sampling_rate": self.sampling_rate}
        if videos:
            found |= {"videos": videos, "do_sample_frames": False}
        return found


def measure_of(medium: Opened) -> Measure:
    """See `Measure`."""
    if isinstance(medium, Image.Image):
        return ("image", *medium.size, 1)
    if isinstance(medium, np.ndarray):
        return ("audio", 0, 0, len(medium))
    return ("video", *medium[0].size, len(medium))


def blank(measure: Measure) -> Opened:
    """A medium of that measure with nothing on it."""
    kind, width, height, count = measure
    if kind == "audio":
        return np.zeros(count, dtype=np.float32)
    frames = [Image.new("RGB", (width, height)) for _ in range(count)]
    return frames if kind == "video" else frames[0]
