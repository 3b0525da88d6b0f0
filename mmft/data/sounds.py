"""A `MediaRef` becomes a mono waveform at the rate a model wants: length checked in the header before decoding.

A truncated, empty, silent or non-finite sound is a `DataError`; nothing is padded or replaced in silence.
"""

from __future__ import annotations

import io
import re
import struct
import wave
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmft.data.media import media_name, read_bytes
from mmft.data.resample import resample
from mmft.data.sample import MediaRef
from mmft.errors import DataError

SILENCE = 1e-5
"""Loudest sample of a sound that counts as silent: below half a step of 16 bits."""
MAX_SECONDS = 600.0
RATES, MOST_CHANNELS = range(1000, 384_001), 16
_BLOCK = 1 << 16
_UNKNOWN = (0, 0xFFFFFFFF)
_MEMORY = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")
"""Sizes that a writer to a pipe, which cannot go back, leaves in a WAV header."""


def open_audio(
    ref: MediaRef, *, sampling_rate: int, max_seconds: float = MAX_SECONDS, silent: bool = False
) -> np.ndarray:
    """Mono float32 samples (N,) at `sampling_rate`: channels averaged, other rates by `resample`.

    WAV, FLAC, OGG (Vorbis, Opus) and MP3 through soundfile; PCM WAV without it. Raises DataError with the file's name
    for one that leaves its root, is no sound, is truncated, declares or holds more than `max_seconds`, has no sample,
    holds NaN or infinity, or (unless `silent`) nothing louder than `SILENCE`.
    """
    name = media_name(ref)
    samples, rate = _decoded(read_bytes(ref), name, max_seconds)
    return plain_sound(samples, rate, where=name, sampling_rate=sampling_rate, silent=silent)


def plain_sound(samples: np.ndarray, rate: int, *, where: str, sampling_rate: int, silent: bool = False) -> np.ndarray:
    """What `open_audio` does behind the decoder, for samples (N,) or (N, channels) that are in memory already."""
    if samples.size == 0 or samples.ndim > 2:
        raise DataError(
            "the sound has no samples" if samples.size == 0 else f"a sound of shape {samples.shape}",
            where=where,
            allowed="samples (N,) or (N, channels)",
            do="give the real recording, or leave the cell empty",
        )
    samples = samples.mean(axis=1) if samples.ndim == 2 else samples
    if not np.isfinite(samples).all():
        raise DataError("the sound holds NaN or infinite samples", where=where, do="mend the file or the row")
    if not silent and np.abs(samples).max() < SILENCE:
        raise DataError("the sound is silent", where=where, do="leave the cell empty, or give the real recording")
    _check_header(rate, 1, 0.0, where=where, max_seconds=1.0)
    return resample(samples, rate, sampling_rate).astype(np.float32)


def audio_seconds(ref: MediaRef, *, max_seconds: float = MAX_SECONDS) -> float:
    """How long a sound is by its header; the same errors as `open_audio` as far as a header shows them."""
    name, data = media_name(ref), read_bytes(ref)
    _check_whole(data, name)
    soundfile = _soundfile()
    if soundfile is None:
        samples, rate = _pcm(data, name, max_seconds)
        return len(samples) / rate
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(
                file.samplerate, file.channels, file.frames / file.samplerate, where=name, max_seconds=max_seconds
            )
            return file.frames / file.samplerate
    except soundfile.LibsndfileError as error:
        raise _broken(error, name) from error


def encode_sound(cell: Mapping[str, Any] | np.ndarray, *, where: str, sampling_rate: int | None = None) -> bytes:
    """Samples in memory, (N,) or (N, channels), as a WAV file of 32-bit floats: the values and rate they have.

    `cell` may be `{"array": samples, "sampling_rate": rate}`, as `datasets` gives it, with channels first when these
    are fewer. Raises DataError for samples without a rate, of another shape or of no numbers.
    """
    rate: Any = sampling_rate
    if isinstance(cell, Mapping):
        rate = cell.get("sampling_rate") or sampling_rate
        cell = cell["array"]
    if isinstance(rate, bool) or not isinstance(rate, int | np.integer):
        raise DataError("samples without a rate", where=where, allowed='{"array": samples, "sampling_rate": 16000}')
    try:
        values = np.asarray(cell, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise DataError(f"the samples are no numbers: {error}", where=where, do="give a list of numbers") from error
    if values.ndim == 2 and values.shape[0] < values.shape[1]:
        values = values.T
    if values.ndim not in (1, 2) or values.size == 0 or (values.ndim == 2 and values.shape[1] > MOST_CHANNELS):
        raise DataError(f"a sound of shape {values.shape}", where=where, do="give samples, or leave the cell empty")
    channels = 1 if values.ndim == 1 else values.shape[1]
    raw = np.ascontiguousarray(values, dtype="<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, channels, int(rate), int(rate) * 4 * channels, 4 * channels, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(raw)) + raw
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its library
        return None
    return soundfile


def _broken(error: Exception, where: str) -> DataError:
    return DataError(
        f"the sound cannot be read: {_MEMORY.sub(' it', str(error))}",
        where=where,
        allowed="a whole WAV, FLAC, OGG or MP3 file",
        do="replace the file or remove the row",
    )


def _decoded(data: bytes, where: str, max_seconds: float) -> tuple[np.ndarray, int]:
    """Samples (N, channels) in [-1, 1] and the rate."""
    _check_whole(data, where)
    soundfile = _soundfile()
    if soundfile is None:
        return _pcm(data, where, max_seconds)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, told = file.samplerate, file.frames
            _check_header(rate, file.channels, told / rate, where=where, max_seconds=max_seconds)
            blocks, held = [], 0
            # In blocks, since some formats do not know their length before they are decoded.
            while len(block := file.read(_BLOCK, dtype="float64", always_2d=True)):
                blocks.append(block)
                held += len(block)
                _check_header(rate, file.channels, held / rate, where=where, max_seconds=max_seconds)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _broken(error, where) from error
    if held < told:
        raise _truncated(f"{held} of {told} samples are there", where)
    return np.concatenate(blocks) if blocks else np.zeros((0, 1)), rate


def _check_header(rate: int, channels: int, seconds: float, *, where: str, max_seconds: float) -> None:
    if rate not in RATES or not 1 <= channels <= MOST_CHANNELS:
        raise DataError(
            f"the sound has {channels} channel(s) at {rate} samples per second",
            where=where,
            allowed=f"1 to {MOST_CHANNELS} channels at {RATES.start} to {RATES.stop - 1}",
            do="convert the file, or remove the row",
        )
    if seconds > max_seconds:
        raise DataError(
            f"the sound lasts {seconds:.1f} s or more",
            where=where,
            allowed=f"at most {max_seconds:g} s",
            do="cut it, or remove the row",
        )


def _check_whole(data: bytes, where: str) -> None:
    """What the decoder would pass over in silence: a WAV shorter than its header says, an OGG without its last page."""
    if not data:
        raise DataError("the sound is empty (0 bytes)", where=where, do="replace the file or remove the row")
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        at = 12
        while at + 8 <= len(data):
            name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
            if name == b"data" and size not in _UNKNOWN and size > len(data) - at - 8:
                raise _truncated(f"{len(data) - at - 8} of {size} bytes of samples are there", where)
            at += 8 + size + size % 2
    if data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        if last + 5 < len(data) and not data[last + 5] & 4:
            raise _truncated("its last page is missing", where)


def _truncated(what: str, where: str) -> DataError:
    return DataError(f"the sound is truncated: {what}", where=where, do="copy the file again, or remove the row")


def _pcm(data: bytes, where: str, max_seconds: float) -> tuple[np.ndarray, int]:
    """PCM WAV without soundfile."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            _check_header(rate, channels, file.getnframes() / max(rate, 1), where=where, max_seconds=max_seconds)
            raw = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
    except (wave.Error, EOFError) as error:
        raise DataError(
            f"the sound is no PCM WAV file that can be read here: {error}",
            where=where,
            allowed="PCM WAV; FLAC, OGG and MP3 with the extra 'audio'",
            do="pip install 'mmft[audio]', or convert the file",
        ) from error
    raw = raw[: len(raw) // (width * channels) * width * channels].reshape(-1, width).astype(np.int64)
    values = sum(raw[:, at] << (8 * at) for at in range(width)) if len(raw) else np.zeros(0, dtype=np.int64)
    half = 1 << (8 * width - 1)
    # Eight bits are unsigned, wider ones two's complement.
    values = values - half if width == 1 else (values + half) % (2 * half) - half
    return (values / half).reshape(-1, channels), rate
