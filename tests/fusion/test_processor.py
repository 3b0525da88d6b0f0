"""Rows to inputs: tables by hand, tokenizers and extractors as they are alone, saving, bad values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from mmft.backbones.load import load_backbone
from mmft.errors import BackboneError, DataError
from mmft.fusion import FusionModel, FusionProcessor, TableSchema
from mmft.recipe.schema import ModelSection
from tests.fusion.small import SCHEMA, SIDE, small_config

WORDS = ["[PAD]", "[UNK]", "a", "red", "dog", "runs"]


def tokenizer():
    core = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")


def processor() -> FusionProcessor:
    side = {"height": SIDE, "width": SIDE}
    pictures = transformers.ViTImageProcessor(size=side)
    sound = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    parts = {"bert": ("text", tokenizer()), "frames": ("video", pictures), "vit": ("image", pictures)}
    return FusionProcessor({**parts, "hubert": ("audio", sound)}, SCHEMA, max_length=6, max_frames=3)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def wave(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)


ROWS = [
    {"bert": "a red dog", "vit": picture(0), "hubert": wave(50), "table": {"age": 50, "dose": 2.0, "site": "b"}},
    {"bert": None, "frames": [picture(i) for i in range(5)], "hubert": {"array": wave(30), "sampling_rate": 16000}},
    {"bert": "runs", "frames": [picture(7)], "table": {"age": math.nan, "site": "q"}},
]


def test_a_table_by_hand():
    found = SCHEMA.encode([{"age": 50, "dose": 1.5, "site": "b"}, {"age": None, "dose": math.nan, "site": None}, None])
    assert found["numeric"].tolist() == [[1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]
    assert found["missing"].tolist() == [[False, False], [True, True], [True, True]]
    assert found["categories"].tolist() == [[3], [0], [0]]
    assert SCHEMA.encode([{"site": "never seen"}])["categories"].tolist() == [[1]]


def test_statistics_are_of_the_rows_given():
    rows = [{"x": 1, "c": 3.0, "k": 7}, {"x": 3.0, "c": None, "k": 7}, {"x": None, "c": "b", "k": 7}, {"x": 8, "k": 7}]
    schema = TableSchema.fit(rows, numeric=["x", "k"], categorical=["c"])
    assert schema.numeric["x"] == (4.0, pytest.approx(math.sqrt((9 + 1 + 16) / 3)))
    assert schema.numeric["k"] == (7.0, 1.0)
    assert schema.categorical == {"c": ("3", "b")}  # pandas makes 3 to 3.0 where a value is missing
    assert TableSchema.from_config(schema.as_config()) == schema
    for bad, text in [({"x": "4"}, "'4' is not a number"), ({"x": math.inf}, "number is inf")]:
        with pytest.raises(DataError, match=f"{text}[\\s\\S]*row 0, x"):
            schema.encode([bad])
    with pytest.raises(DataError, match="'x' has no value in training"):
        TableSchema.fit([{"x": None}], numeric=["x"])


def test_missing_numbers_and_columns_without_numbers():
    torch.manual_seed(0)
    model = FusionModel(small_config((), strategy="early")).eval()
    inputs = SCHEMA.encode([{"age": None, "dose": 2.0, "site": "a"}] * 2)
    inputs["numeric"][1, 0] = 99.0  # whatever stands where a number is missing
    out = model(modalities={"table": inputs}).logits
    assert torch.equal(out[0], out[1])
    config = small_config((), strategy="gated")
    config.table = TableSchema({}, {"c": ("x",)}).as_config()
    only = FusionModel(config).eval()
    encoded = TableSchema({}, {"c": ("x",)}).encode([{"c": "x"}, {"c": None}])
    assert not torch.equal(*only(modalities={"table": encoded}).logits)


def test_each_modality_is_what_its_own_processor_makes():
    made = processor()
    batch = made(ROWS)
    given, present = batch["modalities"], batch["present"]
    assert {name: there.tolist() for name, there in present.items()} == {
        "bert": [True, False, True],
        "frames": [False, True, True],
        "vit": [True, False, False],
        "hubert": [True, True, False],
        "table": [True, False, True],
    }
    assert given["bert"]["input_ids"].tolist() == [[2, 3, 4], [0, 0, 0], [5, 0, 0]]
    assert given["bert"]["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    single = made.parts["vit"][1](ROWS[0]["vit"], return_tensors="pt")["pixel_values"]
    assert torch.equal(given["vit"]["pixel_values"][:1], single)
    # Five frames, at most three: the middles of equal stretches are 0, 2 and 4.
    expected = made.parts["vit"][1]([picture(at) for at in (0, 2, 4)], return_tensors="pt")["pixel_values"]
    assert torch.equal(given["frames"]["pixel_values"][1], expected)
    assert given["frames"]["frame_mask"].tolist() == [[False] * 3, [True] * 3, [True, False, False]]
    alone = made.parts["hubert"][1](wave(30), sampling_rate=16000, return_tensors="pt")["input_values"]
    torch.testing.assert_close(given["hubert"]["input_values"][1:2, :30], alone)
    assert given["hubert"]["attention_mask"].sum(1).tolist() == [50, 30, 0]


def test_save_load_and_the_whole_way(tmp_path):
    torch.manual_seed(0)
    model = FusionModel(small_config(("bert", "frames", "vit", "hubert"))).eval()
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    backbone = load_backbone(ModelSection(name_or_path=str(tmp_path), dtype="float32"))
    assert type(backbone.processor) is FusionProcessor
    first, again = processor()(ROWS), transformers.AutoProcessor.from_pretrained(tmp_path)(ROWS)
    for name, held in first["modalities"].items():
        assert all(torch.equal(value, again["modalities"][name][key]) for key, value in held.items())
    whole = model(**first).logits
    assert torch.equal(backbone.model(**backbone.processor(ROWS)).logits, whole)
    for at, row in enumerate(ROWS):
        torch.testing.assert_close(model(**processor()([row])).logits[0], whole[at], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["whisper", "clap"])
def test_spectrogram_extractors(kind):
    if kind == "whisper":
        extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    else:
        extractor = transformers.ClapFeatureExtractor(feature_size=8, max_length_s=1, sampling_rate=8000)
        extractor.truncation = "rand_trunc"
    made = FusionProcessor({"sound": ("audio", extractor)})
    rows = [
        {"sound": wave(extractor.sampling_rate // 2)},
        {"sound": None},
        {"sound": wave(3 * extractor.sampling_rate)},
    ]
    one, other = made(rows)["modalities"]["sound"], made(rows)["modalities"]["sound"]
    assert all(torch.equal(value, other[key]) for key, value in one.items())  # long sounds are not cut at random
    assert all(len(value) == 3 for value in one.values())
    if kind == "whisper":
        share = one["attention_mask"].float().mean(dim=1).tolist()
        assert share == [pytest.approx(0.5, abs=0.02), 0.0, 1.0]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"bert": 3}, "int is not a text[\\s\\S]*row 0, bert"),
        ({"vit": "cat.png"}, "str is not a picture"),
        ({"frames": []}, "video without frames"),
        ({"hubert": []}, r"sound of shape \(0,\)"),
        ({"hubert": [[1.0], [2.0]]}, r"sound of shape \(2, 1\)"),
        ({"hubert": [0.0, math.nan]}, "NaN or infinite"),
        ({"hubert": {"array": [0.0] * 50, "sampling_rate": 8000}}, "8000 samples per second[\\s\\S]*16000"),
        ({"picture": None}, "no modality is called 'picture'"),
        ({"table": {"age": "old"}}, "'old' is not a number"),
    ],
)
def test_bad_values_name_row_and_modality(row, text):
    with pytest.raises(DataError, match=text):
        processor()([row])


def test_silence_empty_rows_and_wrong_folders(tmp_path):
    silent = processor()([{"hubert": np.zeros(50)}])["modalities"]["hubert"]
    assert torch.isfinite(silent["input_values"]).all()
    nothing = processor()([{}, {}])
    assert nothing["modalities"] == {}
    assert not any(there.any() for there in nothing["present"].values())
    with pytest.raises(DataError, match="without rows"):
        processor()([])
    with pytest.raises(BackboneError, match="holds no processor_config.json"):
        FusionProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    with pytest.raises(BackboneError, match="holds a LlavaProcessor"):
        FusionProcessor.from_pretrained(tmp_path)
