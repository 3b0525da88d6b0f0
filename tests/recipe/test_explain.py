"""The texts of errors, word for word; all at once; the nearest name; what a type allows."""

from __future__ import annotations

import random

import pytest

from mmft.errors import nearest
from mmft.recipe.explain import describe, type_at
from mmft.recipe.normal import sections
from mmft.recipe.schema import AdapterSection, DataSection, Recipe
from tests.runs import write_recipe

HEAD = "model: shipped:nano-vlm\ndata: rows.jsonl\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {dtype: bf61, name_or_path: shipped:x}\ndata: rows.jsonl\n",
            "RecipeError: model.dtype: 'bf61' is not allowed\n  at      r.yaml:1\n"
            "  allowed float32, bfloat16, float16   (nearest: 'bfloat16')\n  do      write bfloat16",
        ),
        (
            HEAD + "adapter:\n  lora_dropout: 1\n",
            "RecipeError: adapter.lora_dropout: 1 is out of range\n  at      r.yaml:4\n"
            "  allowed a number >= 0 and < 1\n  do      choose a value in that range",
        ),
        (
            HEAD + "evaluate:\n  metrics: [exact_match, blue]\n",
            "RecipeError: evaluate.metrics.1: 'blue' is not allowed\n  at      r.yaml:4\n"
            "  allowed exact_match, vqa_accuracy, token_f1, cider, bleu, bleu_1, bleu_2, bleu_3, rouge_l, meteor"
            "   (nearest: 'bleu')\n"
            "  do      write bleu",
        ),
        (
            HEAD + "seed: 1.0\n",
            "RecipeError: train.seed: 1.0 (a number) is not allowed here\n  at      r.yaml:3\n"
            "  allowed a whole number\n  do      write 1",
        ),
        (
            HEAD + "model_revision: 12345e7\n",
            "RecipeError: model.revision: 12345e7 (YAML reads it as a number) is not text\n  at      r.yaml:3\n"
            "  allowed text, or null\n  do      put it into quotes: '12345e7'",
        ),
        (
            HEAD + "adapter: {method: on}\n",
            "RecipeError: adapter.method: the word on (YAML reads it as true) is not allowed\n  at      r.yaml:3\n"
            "  allowed lora, adalora, vera, oft, boft, loha, lokr, ia3, ln_tuning, bitfit, bottleneck, prompt, prefix, "
            "full\n"
            "  do      choose one of the allowed words",
        ),
        (
            HEAD + "train:\n  output_dir:\n",
            "RecipeError: train.output_dir: empty\n  at      r.yaml:4\n  allowed text\n"
            "  do      give a value, or delete the line for the default",
        ),
        (
            "data: rows.jsonl\n",
            "RecipeError: model: missing\n  at      r.yaml:1\n"
            f"  allowed a mapping with the keys {', '.join(sections()['model'].model_fields)}\n  do      add it",
        ),
        (
            "model: shipped:x\ndata:\n  train:\n    - {media_root: .}\n",
            "RecipeError: data.train.0.path: missing\n  at      r.yaml:4\n  allowed text\n  do      add it",
        ),
        (
            HEAD + "adapter:\n  parts:\n    visoin: {mode: full}\n",
            "RecipeError: adapter.parts.visoin: unknown key\n  at      r.yaml:5\n"
            "  allowed vision, audio, projector, cross_attention, language, head   (nearest: 'vision')\n"
            "  do      correct the spelling or delete the line",
        ),
        (
            HEAD + "learning_rte: 1\n",
            "RecipeError: learning_rte: unknown key\n  at      r.yaml:3\n"
            "  allowed name, model, quantization, adapter, data, objective, train, evaluate, export\n"
            "  do      did you mean learning_rate (it is train.learning_rate)?",
        ),
        (
            HEAD + "train: {lora_rank: 1}\n",
            "RecipeError: train.lora_rank: unknown key\n  at      r.yaml:3\n"
            f"  allowed {', '.join(sections()['train'].model_fields)}\n"
            "  do      write it as adapter.lora_rank",
        ),
    ],
)
def test_the_text_of_typical_errors(fails, text, expected):
    assert fails(text) == expected


def test_all_errors_of_a_file_in_one_report(fails):
    text = (
        "model: {dtype: x}\ndata: {train: nowhere.jsonl, max_length: 0}\nseed: 1\ntrain: {seed: 2, bf16: 3}\nmodle: 1\n"
        "export: {merge: false}\nevaluate: {models: [base, merged]}\nname: !!python/name:os.x\n"
    )
    heads = [line.removeprefix("RecipeError: ") for line in fails(text).splitlines() if line.startswith("RecipeError")]
    assert heads == [
        "model.name_or_path: missing",
        "model.dtype: 'x' is not allowed",
        "data.max_length: 0 is out of range",
        "data.train.0.path: 'nowhere.jsonl' does not exist",
        "train.seed: given twice, as `seed` (r.yaml:3) and as `train.seed`",
        "train.bf16: 3 (a whole number) is not allowed here",
        "modle: unknown key",
        "evaluate.models: merged, but export.merge is false: there is no merged model",
        "tag !!python/name:os.x is refused: a recipe is data only",
    ]


def test_a_misspelt_key_does_not_draw_rules_about_its_default(fails):
    text = fails(HEAD + "train: {load_best_model_at_end: true, evl_steps: 10}\ndata.eval: 1\n", "data.eval=held.jsonl")
    assert "train.evl_steps: unknown key" in text and "there is no evaluation" not in text


def typo(word: str, draw: random.Random) -> str:
    place = draw.randrange(1, len(word) - 1)
    kind = draw.randrange(3)
    if kind == 0:
        return word[:place] + word[place + 1 :]
    if kind == 1:
        return word[:place] + draw.choice("aeiourst") + word[place:]
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def test_the_nearest_name_is_right():
    draw = random.Random(0)
    right = total = 0
    for kind in sections().values():
        names = list(kind.model_fields)
        for name in names:
            for _ in range(10):
                wrong = typo(name, draw)
                if wrong not in names and len(name) > 3:
                    total += 1
                    right += nearest(wrong, names) == name
    assert total > 500 and right / total >= 0.95


def test_what_types_allow():
    fields = AdapterSection.model_fields
    assert describe(fields["lora_rank"]) == "a whole number >= 1"
    assert describe(fields["lora_dropout"]) == "a number >= 0 and < 1"
    assert describe(fields["use_rslora"]) == "true or false"
    assert describe(fields["targets"]) == "a list of texts"
    assert describe(DataSection.model_fields["train"]) == "a list of data sets"
    assert describe(type_at(("adapter", "parts", "vision", "lora_rank"))) == "a whole number >= 1, or null"
    assert describe(type_at(("data", "train", 0, "columns"))) == "a mapping from text to texts"
    assert type_at(("train", "nothing")) is None and type_at(("name", "x")) is None


def test_every_field_can_be_described_and_has_a_docstring():
    for kind in (Recipe, *sections().values()):
        for name, field in kind.model_fields.items():
            assert describe(field), name
            assert field.description, name


def test_a_field_of_several_types_is_told_once(tmp_path):
    """No word of pydantic's names for the members of a union, and the other errors are told beside it."""
    from mmft.errors import RecipeError
    from mmft.recipe.load import load_recipe

    changes = {"train.packing": "maybe", "train.fast": ["lora_fsed"], "data.augmentation": {"flp": 1.0}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path, changes))
    told = [problem.what for problem in caught.value.problems]
    assert len(told) == 3 and "train.packing: 'maybe' is not allowed" in told
    assert "train.fast: ['lora_fsed'] is not allowed" in told and "literal[" not in str(caught.value)
