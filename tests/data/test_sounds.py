"""Sounds: what is decoded, resampled and refused."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest

from mmft.data.resample import low_pass, resample
from mmft.data.sample import MediaRef
from mmft.data.sounds import audio_seconds, encode_sound, open_audio
from mmft.errors import DataError
from tests.data.test_tables import wav

TONE = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000) * 0.5


def ref(data: bytes) -> MediaRef:
    return MediaRef("audio", data=data)


def written(samples: np.ndarray, form: str, subtype: str | None = None, rate: int = 16000) -> bytes:
    soundfile = pytest.importorskip("soundfile", reason="needs the extra 'audio'")
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


@pytest.mark.parametrize("library", [True, False], ids=["soundfile", "wave"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width_and_two_channels(width, library, monkeypatch):
    if not library:
        monkeypatch.setitem(sys.modules, "soundfile", None)
    rng = np.random.default_rng(0)
    steps = 1 << (8 * width - 1)
    samples = np.floor(rng.uniform(-1, 1, (50, 2)) * steps) / steps
    samples[0] = -1.0
    found = open_audio(ref(wav(samples, width=width)), sampling_rate=16000)
    np.testing.assert_allclose(found, samples.mean(axis=1), rtol=0, atol=1e-7)  # float32


@pytest.mark.parametrize(
    ("rate", "wanted", "samples"), [(44100, 16000, 5000), (8000, 16000, 777), (48000, 16000, 1), (16000, 22050, 20001)]
)
def test_resampling_equals_scipys_polyphase(rate, wanted, samples):
    signal = pytest.importorskip("scipy.signal")
    given = np.random.default_rng(0).normal(size=samples)
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    expected = signal.resample_poly(given, up, down, window=low_pass(up, down) / up)
    np.testing.assert_allclose(resample(given, rate, wanted), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_a_tone_survives_and_what_is_too_high_goes(rate):
    at = np.arange(rate) / rate
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    found = resample(np.sin(2 * np.pi * 440 * at), rate, 16000)
    assert len(found) == 16000
    np.testing.assert_allclose(found[200:-200], expected[200:-200], rtol=0, atol=1e-4)
    if rate > 20000:
        assert np.abs(resample(np.sin(2 * np.pi * 9000 * at), rate, 16000)[200:-200]).max() < 1e-4


def test_every_format_of_the_library_is_read_at_the_wanted_rate():
    for form, subtype, error in [
        ("FLAC", None, 1e-4),
        ("OGG", "VORBIS", 0.05),
        ("MP3", None, 0.1),
        ("WAV", "FLOAT", 1e-7),
    ]:
        data = written(TONE, form, subtype)
        found = open_audio(ref(data), sampling_rate=16000)
        assert found.dtype == np.float32 and abs(len(found) - 16000) < 2500, form
        shared = slice(2000, 10000)
        shift = 0 if form != "MP3" else int(np.argmax(np.correlate(found, TONE[:4000], "valid")[:2500]))
        assert np.abs(found[shift:][shared] - TONE[shared]).max() < error, form
        assert audio_seconds(ref(data)) == pytest.approx(1.0, abs=0.15)
    assert len(open_audio(ref(written(TONE, "FLAC")), sampling_rate=8000)) == 8000


def cut_ogg() -> bytes:
    data = written(np.random.default_rng(0).normal(size=160000) * 0.1, "OGG", "VORBIS")
    return data[: data.rfind(b"OggS")]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: wav(TONE[:, None])[:-1000], "truncated: 31000 of 32000 bytes"),
        (lambda: written(TONE, "FLAC")[:-3000], "truncated|cannot be read"),
        (cut_ogg, "truncated: its last page"),
        (lambda: b"", "empty \\(0 bytes\\)"),
        (lambda: b"hello, this is no sound at all" * 10, "cannot be read"),
        (lambda: wav(np.zeros((0, 1))), "no samples"),
        (lambda: wav(np.zeros((800, 1))), "silent"),
        (lambda: encode_sound(np.array([0.1, np.nan]), where="", sampling_rate=16000), "NaN or infinite"),
        (lambda: encode_sound(np.array([0.1, np.inf]), where="", sampling_rate=16000), "NaN or infinite"),
        (lambda: wav(np.ones((1000, 1)) / 2, rate=200), "at 200 samples per second"),
        (lambda: wav(np.ones((10, 32)) / 2), "32 channel"),
    ],
)
def test_bad_sounds_are_refused(make, text):
    if make() != b"":
        with pytest.raises(DataError, match=text):
            open_audio(ref(make()), sampling_rate=16000)
    else:
        with pytest.raises(DataError, match=text):
            open_audio(ref(b""), sampling_rate=16000)


def test_silence_may_be_asked_for_and_a_pipes_wav_is_whole():
    assert open_audio(ref(wav(np.zeros((800, 1)))), sampling_rate=16000, silent=True).shape == (800,)
    data = bytearray(wav(TONE[:, None]))
    data[40:44] = b"\xff\xff\xff\xff"
    assert len(open_audio(ref(bytes(data)), sampling_rate=16000)) == 16000


def test_length_is_checked_in_the_header_before_anything_is_decoded(monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    data = written(np.zeros(16000 * 61), "FLAC")
    assert len(data) < 60_000  # a minute of silence is a small file

    def never(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(soundfile.SoundFile, "read", never)
    with pytest.raises(DataError, match="lasts 61.0 s[\\s\\S]*at most 60 s"):
        open_audio(ref(data), sampling_rate=16000, max_seconds=60)
    with pytest.raises(DataError, match="lasts 61.0 s"):
        audio_seconds(ref(data), max_seconds=60)


def test_a_sound_stays_below_its_root(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "out.wav").write_bytes(wav(TONE[:, None]))
    (tmp_path / "root" / "link.wav").symlink_to(tmp_path / "out.wav")
    for path in ("../out.wav", str(tmp_path / "out.wav"), "link.wav", "http://x/y.wav"):
        with pytest.raises(DataError, match="path"):
            open_audio(MediaRef("audio", path=path, root=tmp_path / "root"), sampling_rate=16000)


def test_samples_in_memory_keep_their_values():
    given = np.random.default_rng(0).normal(size=(2, 500)).astype(np.float32)
    data = encode_sound({"array": given, "sampling_rate": 16000}, where="row")
    np.testing.assert_allclose(open_audio(ref(data), sampling_rate=16000), given.mean(axis=0), atol=1e-7)
    with pytest.raises(DataError, match="no numbers"):
        encode_sound({"array": ["a"], "sampling_rate": 16000}, where="row")
