"""Pairs of a sound and its captions on a tiny CLAP: made WAV files in, adapter, merge, proof and retrieval out."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

import mmft
from mmft.backbones.load import load_processor
from mmft.data.formats import load_samples
from mmft.errors import DataError
from mmft.kinds import kind_of
from mmft.objectives.contrastive_embed import sides
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import DataSource
from tests.families import kinds_c
from tests.objectives.pairs import pair_rows, values
from tests.runs import workshop
from tests.tiny import tiny_tokenizer

RATE, SECONDS = 8000, 1
TONES = {
    "red": 200,
    "green": 500,
    "blue": 900,
    "white": 1400,
    "black": 2000,
    "yellow": 2600,
    "cyan": 3200,
    "pink": 3700,
}
"""Words that the tiny tokenizer knows stand for tones, in Hz."""


@functools.cache
def tiny_clap() -> Path:
    """A random CLAP with its processor: 8 mel bins, one second."""
    folder = workshop() / "tiny-clap"
    tiny = kinds_c.KINDS["clap"]()
    torch.manual_seed(0)
    model = transformers.ClapModel(tiny.config)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.08)
    model.save_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor(
        feature_size=8,
        sampling_rate=RATE,
        hop_length=400,
        fft_window_size=512,
        max_length_s=SECONDS,
        frequency_min=50,
        frequency_max=4000,
        truncation="rand_trunc",
        padding="repeatpad",
    )
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 24
    transformers.ClapProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@functools.cache
def sound_rows(n: int = 32, seed: int = 0) -> Path:
    """`n` rows (audio, caption): tones of eight heights at 16 kHz, some of them stereo, twice as long as the model
    hears."""
    folder = workshop() / f"sounds-{n}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    names, lines = list(TONES), []
    for number in range(n):
        name = names[number % len(names)]
        at = np.arange(int(2 * RATE * 2 * SECONDS)) / (2 * RATE)
        tone = 0.5 * np.sin(2 * np.pi * (TONES[name] + 2 * number + seed) * at)
        noise = np.random.default_rng(fold := number + 1000 * seed).normal(0, 0.01, len(at))
        wave = np.stack([tone + noise, tone - noise], axis=1) if fold % 2 else tone + noise
        soundfile.write(folder / f"{number}.wav", wave, 2 * RATE)
        lines.append(json.dumps({"audio": f"{number}.wav", "caption": f"a {name} square", "group": name}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def _recipe(tmp_path: Path, **changes: object) -> dict:
    told = {key.replace("__", "."): value for key, value in changes.items()}
    return values(
        tmp_path,
        {
            "model.name_or_path": str(tiny_clap()),
            "adapter.targets": ["language.attention", "audio.attention", "projector"],
            "data.train": [{"path": str(sound_rows())}],
            "data.eval": [{"path": str(sound_rows(8, 1)), "name": "held"}],
            "train.save_steps": 0,
            **told,
        },
    )


def test_a_run_on_sounds_learns_merges_and_is_scored(tmp_path):
    report = mmft.train(_recipe(tmp_path, train__max_steps=30), quiet=True)
    assert report["headline"] == "audio_to_text_r@1"
    scores = report["sets"]["held"]["scores"]
    assert {
        f"{way}_{name}" for way in ("audio_to_text", "text_to_audio") for name in ("r@1", "r@5", "r@10", "map")
    } == (set(scores["adapter"]))
    for way in ("audio_to_text", "text_to_audio"):
        assert scores["adapter"][f"{way}_map"]["value"] > scores["base"][f"{way}_map"]["value"] + 0.15
        assert scores["merged"][f"{way}_map"]["value"] == pytest.approx(scores["adapter"][f"{way}_map"]["value"])
    assert report["merge"]["proof"]["embeddings"]["max_difference"] <= 1e-5
    assert "audio to text r@1" in (tmp_path / "runs" / "pairs" / "report.html").read_text()
    transformers.ClapModel.from_pretrained(tmp_path / "runs" / "pairs" / "merged")


def test_a_long_sound_is_cut_where_the_seed_says(tmp_path):
    """CLAP's own extractor draws the place from numpy's global state."""
    recipe = load_recipe(_recipe(tmp_path))
    renderer = kind_of(recipe).renderer(recipe, load_processor(recipe.model))
    samples = load_samples(DataSource(path=str(sound_rows())), seed=0).samples[:4]
    before = np.random.get_state()[1].copy()
    one = renderer.encode_media(samples)
    assert np.array_equal(before, np.random.get_state()[1])
    np.random.seed(5)
    other = renderer.encode_media(samples[::-1])
    assert one["input_features"].shape[0] == 4
    assert torch.equal(one["input_features"], other["input_features"].flip(0))


def test_sides_of_a_model_of_sounds():
    assert sides(transformers.ClapModel.from_pretrained(tiny_clap())) == ("audio", "text")


def test_pictures_for_a_model_of_sounds_are_refused_with_their_row(tmp_path):
    recipe = _recipe(tmp_path, data__train=[{"path": str(pair_rows())}], data__eval=[], export__merge=False)
    with pytest.raises(DataError, match="the row has a picture, and the model takes sounds"):
        mmft.train(recipe, quiet=True)


@pytest.mark.parametrize(("content", "text"), [(b"", "empty"), (b"RIFF1234WAVE", "cannot be read")])
def test_a_broken_sound_names_its_row(tmp_path, content, text):
    (tmp_path / "bad.wav").write_bytes(content)
    rows = [{"audio": "bad.wav", "caption": "red", "group": "a"}, {"audio": "bad.wav", "caption": "blue", "group": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = _recipe(tmp_path, data__train=[{"path": str(tmp_path / "rows.jsonl")}], data__eval=[], export__merge=False)
    with pytest.raises(DataError, match=rf"(?s){text}.*rows\.jsonl:[12]"):
        mmft.train(recipe, quiet=True)
