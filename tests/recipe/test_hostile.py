"""Recipes that mean harm, or are merely broken: one RecipeError with places, in little time and memory."""

from __future__ import annotations

import time

import pytest

HEAD = "model: shipped:nano-vlm\ndata: rows.jsonl\n"
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
MAPS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in range(1, 10)
)
HOSTILE = {
    "python object": (
        HEAD + "name: !!python/object/apply:os.system ['touch canary']\n",
        "is refused: a recipe is data",
    ),
    "python name": (HEAD + "name: !!python/name:os.system\n", "tag !!python/name:os.system is refused"),
    "python module": (HEAD + "name: !!python/module:os\n", "tag !!python/module:os is refused"),
    "python new": (HEAD + "train: !!python/object/new:type {seed: 1}\n", "tag !!python/object/new:type is refused"),
    "own tag": (HEAD + "name: !env HOME\n", "tag !env is refused"),
    "include tag": (HEAD + "name: !include /etc/passwd\n", "tag !include is refused"),
    "binary": (HEAD + "name: !!binary aGVsbG8=\n", "tag !!binary is refused"),
    "set": (HEAD + "train: !!set {a}\n", "tag !!set is refused"),
    "long tag": (HEAD + "name: !<" + "x" * 5000 + "> a\n", "is refused: a recipe is data only"),
    "laughs in lists": (LAUGHS, "more than 10,000 values, aliases written out"),
    "laughs in maps": (MAPS, "more than 10,000 values, aliases written out"),
    "laughs in merge keys": ("a: &a {x: &b [1]}\n" * 1 + "b: &c {<<: *a}\nc: [*c, *d]\n", "alias *d stands inside"),
    "self alias": ("a: &a [*a]\n", "alias *a stands inside its own anchor"),
    "self merge": ("a: &a {<<: *a}\n", "alias *a stands inside its own anchor"),
    "unknown alias": ("a: *b\n", "alias *b stands inside its own anchor or before it"),
    "alias as key": ("a: &a x\n*a : 1\n", "an alias stands where a key belongs"),
    "deep lists": ("a: " + "[" * 10_000, "nested deeper than 50 levels"),
    "deep maps": ("{a: " * 10_000, "nested deeper than 50 levels"),
    "deep blocks": ("".join(" " * n + "a:\n" for n in range(200)), "nested deeper than 50 levels"),
    "deep dashes": ("- " * 5_000, "nested deeper than 50 levels"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(10_001)), "more than 10,000 values"),
    "many entries": ("a: [" + "1," * 20_000 + "]", "more than 10,000 values"),
    "large": (b"#" * 1_000_001, "the recipe is larger than 1,000,000 bytes"),
    "large scalar": ("name: " + "x" * 900_000 + "\n", "cannot be a folder's name"),
    "duplicate key": (HEAD + "seed: 1\nseed: 2\n", "key 'seed' is given twice in one mapping (first at r.yaml:3)"),
    "duplicate section": (HEAD + "train: {}\ntrain: {}\n", "key 'train' is given twice"),
    "duplicate below": (HEAD + "train: {seed: 1, seed: 1}\n", "key 'seed' is given twice"),
    "empty": ("", "the recipe is empty"),
    "only a comment": ("# nothing\n", "the recipe is empty"),
    "null": ("null\n", "the recipe is empty"),
    "text": ("hello\n", "the recipe is not a mapping"),
    "list": ("- a\n", "the recipe is not a mapping"),
    "two documents": (HEAD + "---\n" + HEAD, "more than one YAML document"),
    "tab": ("a:\n\tb: 1\n", "not valid YAML: "),
    "open bracket": ("a: [1\n", "not valid YAML: "),
    "open quote": ("a: 'x\n", "not valid YAML: "),
    "wrong indent": ("a:\n   b: 1\n  c: 2\n", "not valid YAML: "),
    "percent": ("%YAML 9.9\n---\na: 1\n", "not valid YAML: "),
    "control": (b"a: \x00\n", "not valid YAML: "),
    "escape": (b"a: \x1b[31m\n", "not valid YAML: "),
    "not utf-8": (b"a: 1\nb: \xff\n", "the recipe is not UTF-8 text\n  at      r.yaml:2"),
    "utf-16": ("a: 1\n".encode("utf-16"), "the recipe is not UTF-8 text"),
    "null byte by escape": (HEAD + 'name: "a\\0b"\n', "holds NUL or half a surrogate pair"),
    "list as key": ("? [a, b]\n: 1\n", "a list, a mapping or an alias stands where a key belongs"),
    "jinja": ("name: {{ x }}\n", "stands where a key belongs"),
    "no as key": (HEAD + "no: 1\n", "no: unknown key"),
    "number as key": (HEAD + "1: 1\n", "1: unknown key"),
    "dunder": (HEAD + "__class__: 1\nmodel_config: 2\n", "__class__: unknown key"),
    "dunder in section": (HEAD + "train: {__init__: 1}\n", "train.__init__: unknown key"),
    "format string": (HEAD + "name: '{0.__class__}'\n", "name: '{0.__class__}' cannot be a folder's name"),
    "path as name": (HEAD + "name: ../../etc\n", "name: '../../etc' cannot be a folder's name"),
    "newline in name": (HEAD + 'name: "a\\nb"\n', r"name: 'a\nb' cannot be a folder's name"),
    "nan": (HEAD + "lr: .nan\n", "train.learning_rate: .nan is not finite"),
    "inf": (HEAD + "adapter: {lora_alpha: .inf}\n", "adapter.lora_alpha: .inf is not finite"),
    "overflow": (HEAD + "lr: 1e999\n", "train.learning_rate: 1e999 is not finite"),
    "many digits": (HEAD + f"seed: {'9' * 5000}\n", "train.seed: '9999"),
    "text number": (HEAD + "lr: '1e-4'\n", "do      write the number without quotes: 1e-4"),
    "bool number": (
        HEAD + "max_steps: yes\n",
        "train.max_steps: the word yes (YAML reads it as true) is not allowed here",
    ),
    "number bool": (HEAD + "bf16: 1\n", "train.bf16: 1 (a whole number) is not allowed here"),
    "bool text": (HEAD + "model: {revision: no}\n", "model.revision: the word no (YAML reads it as false) is not text"),
    "url data": ("model: shipped:x\ndata: http://169.254.169.254/x\n", "is a URL"),
    "url model": ("model: https://example.org/x\ndata: rows.jsonl\n", "is not a model"),
    "remote code": (HEAD + "trust_remote_code: true\n", "mmft never runs code from a model folder; delete the line"),
    "secret": (HEAD + "hub_token: hf_x\n", "no secret belongs into a recipe"),
    "long path": ("model: shipped:x\ndata: " + "a/" * 5000 + "\n", "does not exist"),
    "section as list": (HEAD + "train: [1]\n", "train: a list is not allowed here"),
    "section as text": (HEAD + "train: fast\n", "train: 'fast' (text) is not allowed here"),
    "deep unknown": (HEAD + "adapter: {parts: {vision: {x: {y: {z: 1}}}}}\n", "adapter.parts.vision.x: unknown key"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipe(fails, tmp_path, name):
    text, expected = HOSTILE[name]
    start = time.process_time()
    error = fails(text)
    assert time.process_time() - start < 2.0  # minutes or no end without the limits
    assert expected in error
    assert "  at      r.yaml" in error
    assert len(error) < 4000
    assert not (tmp_path / "canary").exists()


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 60


def test_hostile_recipes_take_little_memory(load, good):
    import resource

    from mmft.errors import RecipeError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text, _ in HOSTILE.values():
        with pytest.raises(RecipeError):
            load(text)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # KiB
