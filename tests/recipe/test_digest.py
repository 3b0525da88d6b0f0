"""Dump and load are inverse; the digest sees what affects numbers and nothing else; drift names the field."""

from __future__ import annotations

import math
import random
import struct

import pytest
import yaml

from mmft.recipe.load import dump_recipe, load_recipe, recipe_digest, recipe_drift
from mmft.recipe.nodes import parse, resolve_plain
from mmft.recipe.schema import Recipe

FULL = """
model: {name_or_path: shipped:nano-vlm, revision: "1e5", dtype: float32}
load_in_8bit: true
adapter: {targets: [language, vision], parts: {vision: {lr: 1e-5, r: 4}}}
data:
  train: [{path: rows.jsonl, num_samples: 3, columns: {image: no, question: "010"}}]
  eval: held.jsonl
  system: "yes: 'quoted' \\"too\\" – ünïcode\\n\\n 2nd line \\t."
lr: 1.5e-7
adam_epsilon: 1e-12
report_to: [tensorboard]
group_by: ["on", "null", "~", "12:30", "2024-01-01", "1_000", ""]
"""


def test_dump_is_the_inverse_of_load(load, tmp_path, monkeypatch):
    recipe = load(FULL.replace("image: no", "image: 'no'"))
    text = dump_recipe(recipe)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "again.yaml").write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_recipe("again.yaml")
    assert again == recipe and recipe_digest(again) == recipe_digest(recipe) and dump_recipe(again) == text
    assert set(yaml.safe_load(text)) == set(Recipe.model_fields)


def test_dump_makes_paths_absolute(load, tmp_path):
    recipe = load("model: shipped:x\ndata: rows.jsonl\n")
    source = recipe.data.train[0].model_copy(update={"path": "rows.jsonl", "media_root": "."})
    relative = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": (source,)})})
    dumped = yaml.safe_load(dump_recipe(relative))["data"]["train"][0]
    assert dumped["path"] == str(tmp_path / "rows.jsonl") and dumped["media_root"] == str(tmp_path)


def texts():
    draw = random.Random(0)
    yield from (
        "\x85",
        "a\x85b",
        "\u2028",
        "\u2029x",
        "\r",
        "\r\n",
        "\n",
        " a ",
        "\t",
        "\ufeff",
        "\x7f",
        "\uffff",
        "😀",
        "---",
    )
    yield from (
        "<<",
        "=",
        "!x",
        "&a",
        "*a",
        "%x",
        "@x",
        "`",
        "# c",
        "a: b",
        "- a",
        "? a",
        "{a}",
        "[a]",
        "'",
        '"',
        "|",
        ">",
    )
    words = "-+0123456789._eExXnofyas~:"
    breaks = "\n\r\t \x85\u2028\ufeff"
    for _ in range(400):
        yield "".join(draw.choices(words, k=draw.randrange(1, 8)))
        yield "".join(draw.choices("ab:#'\"" + breaks, k=draw.randrange(1, 12)))
        codes = draw.choices([*range(0xD800), *range(0xE000, 0x11000)], k=5)
        yield "".join(map(chr, codes))


def test_any_text_survives():
    base = load_recipe({"model": "shipped:x", "data": "shipped:y"})
    for text in texts():
        recipe = base.model_copy(update={"data": base.data.model_copy(update={"system": text})})
        problems = []
        node = parse(dump_recipe(recipe), "x", problems)
        assert node is not None and problems == []
        assert node.plain()["data"]["system"] == text


def test_any_number_survives():
    draw = random.Random(0)
    for _ in range(3000):
        (number,) = struct.unpack("d", draw.randbytes(8))
        if math.isfinite(number):
            assert resolve_plain(repr(number)) == number


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("+3", 3),
        ("0x1F", 31),
        ("1.", 1.0),
        ("yes", True),
        ("OFF", False),
        ("~", None),
        ("", None),
        ("010", "010"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("5.23.0", "5.23.0"),
        ("y", "y"),
        ("12:30", "12:30"),
        (".", "."),
        ("_1", "_1"),
        ("-", "-"),
    ],
)
def test_plain_words(word, value):
    found = resolve_plain(word)
    assert found == value and type(found) is type(value)


def base_recipe(**overrides):
    pairs = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    return load_recipe({"model": "shipped:x", "data": {"train": "shipped:y", "eval": "shipped:z"}}, pairs)


COSMETIC = {
    "name": "other",
    "train__output_dir": "elsewhere",
    "train__logging_steps": 3,
    "train__report_to": "tensorboard",
    "train__save_steps": 7,
    "train__save_total_limit": 5,
    "train__dataloader_num_workers": 4,
    "train__fast": "[head_rows]",
    "train__packing": False,
    "evaluate__max_new_tokens": 3,
    "evaluate__models": "[base]",
    "export__merge_onto": "base",
    "export__verify_rows": 1,
    "data__train__0__media_root": "/tmp",
}
NUMERIC = {
    "train__seed": 1,
    "train__learning_rate": 3e-4,
    "adapter__lora_rank": 8,
    "adapter__targets": "[vision]",
    "adapter__parts": "{language: {lora_rank: 2}}",
    "data__max_length": 9,
    "data__train__0__num_samples": 2,
    "model__dtype": "float32",
    "quantization__load_in_4bit": "true",
}


@pytest.mark.parametrize("field", COSMETIC)
def test_cosmetic_fields_do_not_count(field):
    recipe = base_recipe(**{field: COSMETIC[field]})
    assert recipe != base_recipe() or COSMETIC[field] == "base"
    assert recipe_digest(recipe) == recipe_digest(base_recipe())
    assert recipe_drift(base_recipe().model_dump(mode="json"), recipe) == []


@pytest.mark.parametrize("field", NUMERIC)
def test_numeric_fields_count(field):
    recipe = base_recipe(**{field: NUMERIC[field]})
    assert recipe_digest(recipe) != recipe_digest(base_recipe())
    names = [name for name, _, _ in recipe_drift(base_recipe().model_dump(mode="json"), recipe)]
    assert names and all(name.startswith(field.replace("__", ".")) for name in names)


def test_drift_tells_old_and_new():
    old = base_recipe().model_dump(mode="json")
    assert recipe_drift(old, base_recipe(train__learning_rate=1e-3, train__seed=2)) == [
        ("train.learning_rate", 2e-4, 1e-3),
        ("train.seed", 0, 2),
    ]
    assert recipe_drift(old, base_recipe(adapter__targets="[vision]")) == [
        ("adapter.targets.0", "language.attention", "vision"),
        ("adapter.targets.1", "language.mlp", None),
    ]


def test_the_digest_does_not_know_the_folder(load, tmp_path):
    first = load("model: shipped:x\ndata: rows.jsonl\n")
    (tmp_path / "moved").mkdir()
    (tmp_path / "rows.jsonl").rename(tmp_path / "moved" / "rows.jsonl")
    (tmp_path / "r.yaml").write_text("model: shipped:x\ndata: moved/rows.jsonl\n")
    assert recipe_digest(load_recipe("r.yaml")) == recipe_digest(first)
