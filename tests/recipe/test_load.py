"""Loading: lines through extends and overrides, merging, defaults that follow, paths, cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mmft.errors import RecipeError
from mmft.recipe.load import load_recipe, load_with_places


def test_the_smallest_recipe(load, good, tmp_path):
    recipe = load(good)
    assert recipe.name == "r" and recipe.model.name_or_path == "shipped:nano-vlm"
    assert recipe.data.train[0].path == str(tmp_path / "rows.jsonl")
    assert recipe == load_recipe(tmp_path / "r.yaml") == load_recipe(str(tmp_path / "r.yaml"))


def test_yaml_words(load, good):
    train = "train: {learning_rate: 1e-4, weight_decay: .5, max_grad_norm: 2, bf16: off, seed: 1_000, output_dir: 010}"
    recipe = load(good + train)
    assert recipe.train.learning_rate == 1e-4 and recipe.train.weight_decay == 0.5
    assert recipe.train.max_grad_norm == 2.0 and recipe.train.bf16 is False and recipe.train.seed == 1000
    assert recipe.train.output_dir == "010"  # YAML 1.1 would read eight
    assert load(good + "train: {output_dir: 12:30}").train.output_dir == "12:30"
    assert load(good + "train: {output_dir: 2024-01-01}").train.output_dir == "2024-01-01"


def test_merge_keys_and_anchors(load, good):
    text = (
        good + "adapter:\n  targets: [language, vision]\n  parts:\n    vision: &p {learning_rate: 1e-5, lora_rank: 4}\n"
    )
    recipe = load(text + "    language: {<<: *p, lora_rank: 8}\n")
    assert recipe.adapter.parts["language"].model_dump() == {
        "mode": "lora",
        "lora_rank": 8,
        "lora_alpha": None,
        "learning_rate": 1e-5,
    }


def test_extends_merges_mappings_and_replaces_lists(load, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "near.jsonl").write_text("{}")
    (tmp_path / "base" / "b.yaml").write_text(
        "model: {model_name_or_path: shipped:a, dtype: float32}\ndata: {train: [near.jsonl, near.jsonl]}\nlr: 1e-3\n"
    )
    recipe = load("extends: base/b.yaml\nmodel: shipped:b\ntrain: {epochs: 2}\n")
    assert (recipe.model.name_or_path, recipe.model.dtype) == ("shipped:b", "float32")
    assert (recipe.train.learning_rate, recipe.train.num_train_epochs) == (1e-3, 2.0)
    assert [source.path for source in recipe.data.train] == [str(tmp_path / "base" / "near.jsonl")] * 2
    assert [s.path for s in load("extends: base/b.yaml\ndata: rows.jsonl\n").data.train] == [
        str(tmp_path / "rows.jsonl")
    ]


def test_lines_through_extends_and_overrides(load, tmp_path, fails):
    (tmp_path / "b.yaml").write_text("model: shipped:a\ntrain:\n  seed: 0\n  lr: abc\ndata: rows.jsonl\n")
    assert fails("extends: b.yaml\n\ntrain:\n  max_steps: 0\n", "train.weight_decay=x", "adapter.r=-1") == (
        "RecipeError: train.learning_rate: 'abc' (text) is not allowed here\n"
        "  at      b.yaml:4\n"
        "  allowed a number > 0\n"
        "  do      give what is allowed\n"
        "RecipeError: train.max_steps: 0 is out of range\n"
        "  at      r.yaml:4\n"
        "  allowed a whole number >= 1, or null\n"
        "  do      choose a value in that range\n"
        "RecipeError: adapter.lora_rank: -1 is out of range\n"
        "  at      command line: adapter.r=-1\n"
        "  allowed a whole number >= 1\n"
        "  do      choose a value in that range\n"
        "RecipeError: train.weight_decay: 'x' (text) is not allowed here\n"
        "  at      command line: train.weight_decay=x\n"
        "  allowed a number >= 0\n"
        "  do      give what is allowed"
    )
    # An override that mends the parent's error takes the error away.
    assert load("extends: b.yaml\n", "train.lr=abc", "lr=2e-4").train.learning_rate == 2e-4


def test_circles_depth_and_bad_parents(load, fails, tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    text = fails("extends: a.yaml\n")
    assert "extends: circle: r.yaml -> a.yaml -> b.yaml -> a.yaml\n  at      b.yaml:1" in text
    assert "extends: circle: r.yaml -> r.yaml\n  at      r.yaml:1" in fails("extends: r.yaml\n")
    assert "extends: '/etc/passwd' is not a recipe file" in fails("extends: /etc/passwd\n")
    assert "recipe file aa.yaml does not exist\n  at      r.yaml:1" in fails("extends: aa.yaml\n")
    for index in range(13):
        (tmp_path / f"n{index}.yaml").write_text(f"extends: n{index + 1}.yaml\n")
    assert "extends: more than 10 files deep" in fails("extends: n0.yaml\n")


def test_overrides(load, good, tmp_path):
    recipe = load(
        good,
        "data.train.0.path=held.jsonl",
        "data.train.1.file=rows.jsonl",
        "data.train.1.limit=3",
        "train.learning_rate=1e-5",
        "seed = 7",
        "adapter.parts.language.lr=1e-6",
        "evaluate.metrics=[exact_match, cider]",
        "evaluate.metrics.1=bleu",
        "model.revision='12345678'",
        "train.max_steps=",
        "name=other",
    )
    assert [source.path for source in recipe.data.train] == [str(tmp_path / n) for n in ("held.jsonl", "rows.jsonl")]
    assert recipe.data.train[1].num_samples == 3
    assert (recipe.train.learning_rate, recipe.train.seed, recipe.name) == (1e-5, 7, "other")
    assert recipe.adapter.parts["language"].learning_rate == 1e-6
    assert recipe.evaluate.metrics == ("exact_match", "bleu")
    assert recipe.model.revision == "12345678" and recipe.train.max_steps is None


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("foo", "override 'foo' is not of the form key=value"),
        ("=3", "override '=3' is not of the form key=value"),
        ("train..lr=3", "override 'train..lr=3' is not of the form key=value"),
        ("data.train.5.path=x", "data.train.5: no such list entry (its length is 1)"),
        ("data.0=x", "data.0: no such list entry (it is not a list)"),
        ("train.seed.0=1", "train.seed: a list is not allowed here"),
        ("extends=b.yaml", "extends: cannot be set on the command line"),
        ("name=[", "not valid YAML"),
        ("train.lr.x=3", "train.learning_rate: a mapping is not allowed here"),
        ("train.seed=!!python/name:os.system", "tag !!python/name:os.system is refused"),
    ],
)
def test_bad_overrides(fails, good, override, text):
    error = fails(good, override)
    assert text in error and f"at      command line: {override}" in error


def test_a_mapping_as_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    recipe = load_recipe({"model": "shipped:x", "data": {"train": ({"path": tmp_path / "rows.jsonl"},)}, "lr": 1})
    assert recipe.name == "run" and recipe.train.learning_rate == 1.0
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            {"model": "shipped:x", "data": "rows.jsonl", "train": {"seed": object(), "lr": float("nan"), "sed": 1}}
        )
    assert str(caught.value) == (
        "RecipeError: train.learning_rate: nan is not finite\n"
        "  at      mapping: train.lr\n"
        "  allowed a finite number\n"
        "  do      write the number out\n"
        "RecipeError: train.sed: unknown key\n"
        "  at      mapping: train.sed\n"
        f"  allowed {', '.join(type(recipe.train).model_fields)}   (nearest: 'seed')\n"
        "  do      correct the spelling or delete the line\n"
        "RecipeError: train.seed: a value of type object has no place in a recipe\n"
        "  at      mapping: train.seed\n"
        "  allowed text, numbers, true/false, null, lists and mappings\n"
        "  do      give a plain value"
    )


def test_places(load, good):
    load(good)
    places = load_with_places("r.yaml", ["lr=1e-4"]).places
    assert places["data.train"] == "r.yaml:3" and places["train.learning_rate"] == "command line: lr=1e-4"


def test_models_follow_from_no_merge(load, good):
    assert load(good + "export: {merge: false}").evaluate.models == ("base", "adapter")
    assert load(good).evaluate.models == ("base", "adapter", "merged")


def test_relative_paths_prefer_the_recipes_folder(tmp_path, monkeypatch):
    recipes, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (recipes, here):
        (folder / "model").mkdir(parents=True)
        (folder / "rows.jsonl").write_text("")
    (here / "only.jsonl").write_text("")
    (recipes / "pictures").mkdir()
    (recipes / "r.yaml").write_text(
        "model: ./model\noutput_dir: ~/runs\n"
        "data: {train: {path: rows.jsonl, media_root: pictures}, eval: only.jsonl}\n"
    )
    monkeypatch.chdir(here)
    recipe = load_recipe("../recipes/r.yaml")
    data = recipe.data
    assert os.path.samefile(recipe.model.name_or_path, recipes / "model")
    assert os.path.samefile(data.train[0].path, recipes / "rows.jsonl")
    assert os.path.samefile(str(data.train[0].media_root), recipes / "pictures")
    assert os.path.isabs(data.eval[0].path) and os.path.samefile(data.eval[0].path, here / "only.jsonl")
    assert recipe.train.output_dir == os.path.expanduser("~/runs")


def test_missing_files_are_refused_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipes.yaml")
    assert str(caught.value) == (
        "RecipeError: recipe file recipes.yaml does not exist\n  at      recipes.yaml\n  allowed a YAML file\n"
        "  do      check the path (nearest: 'recipe.yaml')"
    )
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "/dev/zero", "."):
        with pytest.raises(RecipeError, match="is not a file"):
            load_recipe(name)


def test_loading_costs_little_and_imports_nothing_heavy(load, good, tmp_path):
    load(good + "lr: 1e-4\nadapter: qlora\n")
    code = (
        "import json, sys, time; from mmft.recipe.load import load_recipe; load_recipe(sys.argv[1]);"
        "print(json.dumps([time.process_time(), [m for m in ('torch', 'rich', 'typer', 'numpy', 'transformers',"
        "'datasets') if m in sys.modules]]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    seconds, heavy = json.loads(done.stdout)
    assert heavy == []
    assert seconds < 0.6  # processor time, start of Python included; 0.2 s on the machine it was written on
