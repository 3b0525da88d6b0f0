"""The shipped fusion sets: what their rows hold, that parts share no concept, and that a build is repeated exactly."""

from __future__ import annotations

import importlib.metadata
import itertools
import wave

import numpy as np
import pytest
from PIL import Image

from mmft.data import emoji, fusion_events, fusion_sentiment, fusion_ward
from mmft.data.formats import load_many
from mmft.data.fusion_sets import FUSION_SETS, MAKERS, build_fusion, shipped_fusion
from mmft.data.speech import PACKAGE, RATE, tone, with_noise, write_wav
from mmft.data.table_rows import label_of, open_sample
from mmft.errors import DataError
from mmft.recipe.schema import DataSection, DataSource


def needs(*packages: str) -> None:
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"extras: demo, fusion ({package} is not installed)")


def test_unknown_sets_are_named():
    with pytest.raises(DataError, match="no shipped fusion set 'emoij-train'[\\s\\S]*nearest: 'emoji-train'"):
        shipped_fusion("emoij-train")


@pytest.mark.parametrize("name", FUSION_SETS)
def test_rows_open_as_a_table(name, tmp_path):
    needs(*emoji.PACKAGES, PACKAGE)
    path = build_fusion(name, tmp_path / name, limit=6)
    columns = {
        "emoji": {"text": "text"},
        "sentiment": {"text": "text"},
        "events": {"text": "text"},
        "ward": {"note": "text", "place": "categorical"},
    }
    tags = {"emoji": "quality", "sentiment": "agreement", "events": "weather", "ward": "clinic"}
    kind = name.rsplit("-", 1)[0]
    source = DataSource(path=str(path), columns={**columns[kind], tags[kind]: "tag"})
    [loaded] = load_many([source], DataSection(train=[source]), 0, wanted=("table",))
    assert len(loaded.samples) == 6
    for sample in loaded.samples:
        assert label_of(sample)
        assert sample.tags[tags[kind]]
        opened = open_sample(sample)
        assert all(value is not None for key, value in opened.items() if key != "table")
        if "frames" in opened:
            assert len(opened["frames"]) == fusion_events.FRAMES
        if "audio" in opened:
            assert 0.3 * RATE < len(opened["audio"]) < 6 * RATE


def test_a_build_is_repeated_but_for_the_voice(tmp_path):
    needs(*emoji.PACKAGES, PACKAGE)
    one, two = (build_fusion("sentiment-test", tmp_path / name, limit=3) for name in ("one", "two"))
    assert one.read_text() == two.read_text()
    for path in (one.parent / "images").iterdir():
        assert path.read_bytes() == (two.parent / "images" / path.name).read_bytes()


def test_train_and_test_share_no_word_face_or_thing():
    needs(*emoji.PACKAGES)
    train, test = (fusion_sentiment._WORDS[part] for part in ("train", "test"))
    assert not set(itertools.chain(*train.values())) & set(itertools.chain(*test.values()))
    for kinds in fusion_sentiment._FACES.values():
        faces = [{row["name"] for row in fusion_sentiment._faces(kinds, part)} for part in ("train", "test")]
        assert all(faces) and not faces[0] & faces[1]
    for groups in fusion_events._KINDS.values():
        things = [
            {fusion_events._plain(row) for row in fusion_events._things(groups, part)} for part in ("train", "test")
        ]
        assert all(things) and not things[0] & things[1]
    for finding in fusion_ward.FINDINGS:
        assert not set(finding.said) & set(finding.said_later)


def test_only_the_order_of_the_frames_tells_coming_from_going():
    art = Image.new("RGBA", (96, 96), (200, 0, 0, 255))
    comes, goes = (
        fusion_events.frames(art, np.random.default_rng(0), comes=value, fog=False) for value in (True, False)
    )
    assert [frame.tobytes() for frame in comes] == [frame.tobytes() for frame in goes[::-1]]
    assert comes[0].tobytes() != comes[-1].tobytes()


def test_the_ward_needs_no_package_and_has_its_shares():
    rows = list(itertools.islice(MAKERS["ward"]("train"), 400))
    shares = {one.name: sum(row["label"] == one.name for row in rows) / 400 for one in fusion_ward.FINDINGS}
    for one in fusion_ward.FINDINGS:
        assert abs(shares[one.name] - one.share) < 0.07
    empty = np.mean([row["age"] is None for row in rows])
    assert abs(empty - fusion_ward.MISSING) < 0.06


def test_sounds_by_hand(tmp_path):
    sound = tone(np.full(RATE, 440.0))
    spectrum = np.abs(np.fft.rfft(sound))
    assert int(spectrum.argmax()) == 440
    noisy = with_noise(sound, -10.0, np.random.default_rng(0))
    ratio = np.square(noisy - sound).mean() / np.square(sound).mean()
    assert ratio == pytest.approx(10.0, rel=0.05)
    write_wav(tmp_path / "x.wav", 3 * sound)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, RATE)
