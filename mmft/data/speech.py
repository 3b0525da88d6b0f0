"""Spoken text and made sounds for the shipped fusion sets: 16 kHz, mono, samples in [-1, 1].

The voices are SVOX Pico's, in the pip package py-nanotts (Apache-2.0). Its synthesis draws from a state that goes on
from call to call, so the same text twice differs in the last bits; a fresh process gives the same sounds again.
"""

from __future__ import annotations

import importlib
import wave
from pathlib import Path

import numpy as np

from mmft.data.emoji import package_version

PACKAGE = "py-nanotts"
RATE = 16000
VOICES = ("en-GB", "en-US")


def speak(text: str, *, voice: str = "en-US", speed: float = 1.0, pitch: float = 1.0) -> np.ndarray:
    """The text in a voice, float32. Raises DataError that names the extra where the package is missing."""
    package_version(PACKAGE)
    data = importlib.import_module("py_nanotts").NanoTTS().speak(text, voice=voice, speed=speed, pitch=pitch)
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / 32768


def with_noise(sound: np.ndarray, decibels: float, rng: np.random.Generator) -> np.ndarray:
    """The sound in white noise whose power lies `decibels` below its own."""
    power = float(np.square(sound).mean()) / 10 ** (decibels / 10)
    return sound + rng.normal(0, power**0.5, len(sound)).astype(np.float32)


def tone(frequencies: np.ndarray, *, loudness: float = 0.3) -> np.ndarray:
    """A sound whose frequency in hertz is given for every sample."""
    return (loudness * np.sin(2 * np.pi * np.cumsum(frequencies) / RATE)).astype(np.float32)


def write_wav(path: Path, sound: np.ndarray) -> None:
    """A 16-bit WAV file; samples beyond [-1, 1] are scaled down together."""
    loudest = max(1.0, float(np.abs(sound).max()))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound / loudest * 32767).astype("<i2").tobytes())
