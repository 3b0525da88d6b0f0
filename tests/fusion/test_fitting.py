"""The short door over a made table: text, picture, numbers and categories."""

from __future__ import annotations

import math
import signal

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image

from mmft import fitting
from mmft.errors import DataError, RecipeError
from mmft.fitting import Fitted, fit
from mmft.fusion import FusionConfig
from tests.fusion.small import ENCODERS, SIDE
from tests.fusion.test_processor import tokenizer

SMALL = {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "dropout": 0.0}
COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny text encoder and a tiny image encoder with their processors, and two pictures."""
    home = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    for name in ("bert", "vit"):
        transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**ENCODERS[name][1])).save_pretrained(
            home / name
        )
    tokenizer().save_pretrained(home / "bert")
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(home / "vit")
    for name, colour in COLOURS.items():
        Image.new("RGB", (SIDE, SIDE), colour).save(home / f"{name}.png")
    return home


def frame(rows: int, seed: int) -> pd.DataFrame:
    """The label needs the text, the picture and the site: three of their combinations are `yes`."""
    rng = np.random.default_rng(seed)
    text, colour, site = (rng.integers(0, 2, rows) for _ in range(3))
    return pd.DataFrame(
        {
            "note": np.where(text, "a red dog runs", "a dog a dog"),
            "photo": np.where(colour, "red.png", "blue.png"),
            "site": np.where(site, "north", "south"),
            "age": rng.normal(50, 10, rows),
            "y": np.where(text + colour + site >= 2, "yes", "no"),
        }
    )


def test_text_picture_and_table(folder, tmp_path):
    options = {
        "label": "y",
        "columns": {"note": "text"},
        "encoders": {"text": str(folder / "bert"), "image": str(folder / "vit")},
        "root": folder,
        "epochs": 6,
        "encoder_learning_rate": 3e-3,
        "learning_rate": 3e-3,
        "balanced": True,
    }
    fusion = FusionConfig(strategy="gated", modality_dropout=0.05, **SMALL)
    train, test = frame(96, 0), frame(40, 1)
    state = torch.get_rng_state()
    fitted = fit(train, fusion=fusion, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert fusion.encoders is None  # the caller's config is not written into
    assert fitted.model.config.modalities == ("note", "photo", "table")
    assert len(fitted.losses) == 36
    scores = fitted.evaluate(test, resamples=50)
    assert scores["accuracy"].value > 0.9
    assert scores["accuracy"].n == 40
    predicted = fitted.predict(test.drop(columns="y"))
    right = np.mean([one["prediction"] == label for one, label in zip(predicted, test["y"], strict=True)])
    assert right == pytest.approx(scores["accuracy"].value)
    assert all(sum(one["probabilities"].values()) == pytest.approx(1.0, abs=1e-5) for one in predicted)

    fitted.save(tmp_path)
    again = Fitted.load(tmp_path, root=folder)
    assert again.predict(test) == predicted
    assert again.columns == fitted.columns

    holes = test.assign(note=None)
    holes.loc[3, ["photo", "site"]] = None
    assert len(fitted.predict(holes)) == 40
    with pytest.raises(DataError, match="label 'maybe' is not in the declared set"):
        fitted.evaluate(test.assign(y="maybe"))


def test_the_columns_are_printed(folder, capsys):
    options = {"label": "y", "encoders": {"text": str(folder / "bert"), "image": str(folder / "vit")}, "epochs": 1}
    fitted = fit(frame(12, 0), root=folder, fusion=FusionConfig(**SMALL), **options)
    printed = capsys.readouterr().err.splitlines()
    assert printed[1] == "photo  image        12 paths of image files" and printed[4] == "y      label        declared"
    frame(12, 0).to_csv(folder / "rows.csv", index=False)  # paths of a file are relative to it
    assert (
        len(fit(folder / "rows.csv", quiet=True, fusion=FusionConfig(**SMALL), **options).predict(folder / "rows.csv"))
        == 12
    )
    assert "paths of image files" not in capsys.readouterr().err
    with pytest.raises(DataError, match=r"no column 'photo' \(image\)"):
        fitted.predict(frame(12, 0).drop(columns="photo"))


@pytest.fixture
def interruptible():
    """Ctrl-C as at a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_reaches_the_caller(folder, monkeypatch, interruptible):
    """The engine stops after its step; half a fit is not taken for one."""
    steps = []
    monkeypatch.setattr(fitting._Losses, "on_step", lambda *_: steps.append(1) or signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit(frame(40, 0), label="y", encoders={"text": str(folder / "bert")}, columns={"photo": "ignored"}, epochs=2)
    assert len(steps) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_same_seed_gives_the_same_model_and_frozen_encoders_stay(folder):
    options = {
        "label": "y",
        "encoders": {"text": str(folder / "bert")},
        "columns": {"note": "text", "photo": "ignored"},
    }
    options |= {"epochs": 1, "fusion": FusionConfig(modality_dropout=0.3, **{**SMALL, "dropout": 0.2})}
    one, two, other = (fit(frame(40, 0), seed=seed, **options) for seed in (0, 0, 1))
    assert one.losses == two.losses != other.losses
    start = transformers.AutoModel.from_pretrained(folder / "bert").state_dict()
    kept = one.model.encoders["note"].tower.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in kept.items())


def test_a_table_alone_ordinal_and_regression():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, 200)
    data = pd.DataFrame({"x": x, "z": rng.normal(size=200), "y": 100 + 10 * x})
    fitted = fit(data, label="y", task="regression", fusion=FusionConfig(**SMALL), epochs=15, learning_rate=1e-2)
    found = fitted.evaluate(data, resamples=20)
    assert found["r2"].value > 0.95
    assert found["rmse"].value < 3  # in the target's own unit; its spread is 11.5
    assert abs(fitted.predict([{"x": 1.0, "z": 0.0}])[0]["prediction"] - 110) < 4
    with pytest.raises(DataError, match="the label is empty[\\s\\S]*row 2"):
        fit(data.assign(y=[1.0, 2.0, math.nan] + [0.0] * 197), label="y", task="regression")

    grades = np.array(["low", "middle", "high"])[np.digitize(x, [-0.7, 0.7])]
    data = data.assign(y=grades)
    fitted = fit(
        data,
        label="y",
        task="ordinal",
        classes=["low", "middle", "high"],
        fusion=FusionConfig(**SMALL),
        epochs=12,
        learning_rate=1e-2,
    )
    found = fitted.evaluate(data, resamples=20)
    assert fitted.classes == ("low", "middle", "high")
    assert found["quadratic_kappa"].value > 0.9
    assert found["mae"].value == pytest.approx(
        np.mean(
            [
                abs(fitted.classes.index(one["prediction"]) - fitted.classes.index(label))
                for one, label in zip(fitted.predict(data), grades, strict=True)
            ]
        )
    )


def test_bad_fits_are_named(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(fitting.ENCODERS, "text", "shipped:gone")
        with pytest.raises(RecipeError, match="'note' holds text, no encoder is given[\\s\\S]*encoders=\\{'text'"):
            fit(frame(20, 0), label="y", columns={"note": "text"}, root=folder)
    with pytest.raises(DataError, match="no column 'photo'"):
        fit(frame(20, 0).drop(columns="photo"), label="y", columns={"photo": "image"}, root=folder)
    with pytest.raises(RecipeError, match="nearest: 'regression'"):
        fit(frame(20, 0), label="y", task="regresion")
    with pytest.raises(DataError, match=r"class\(es\) maybe never occur in training"):
        fit(frame(20, 0), label="y", classes=["yes", "no", "maybe"], root=folder)
    with pytest.raises(DataError, match="the label is empty[\\s\\S]*row 0"):
        fit(frame(20, 0).assign(y=None), label="y", root=folder)
