"""Rules that look at more than one field: a table of (field, what it reads, test, message, remedy)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmft.errors import Problem
from mmft.recipe.augmentation import augmentations
from mmft.recipe.check_adapter import ADAPTER_RULES, missing_adapter, on_quantized, part_modes, targets, unread_fields
from mmft.recipe.check_objective import OBJECTIVE_RULES
from mmft.recipe.check_pairs import PAIR_RULES
from mmft.recipe.check_preference import PREFERENCE_RULES
from mmft.recipe.check_streams import READS, streams
from mmft.recipe.nodes import Node
from mmft.recipe.ondisk import Finding, is_below_file, missing_model, missing_sources
from mmft.recipe.rules import PARTS, SUBPARTS, Rule, quantized, target_parts
from mmft.recipe.schema import DataSource, Recipe

__all__ = ["LIST_RULES", "PARTS", "RULES", "SUBPARTS", "Rule", "check", "quantized", "source_name", "target_parts"]


def _watches_eval(recipe: Recipe) -> bool:
    return recipe.train.load_best_model_at_end or recipe.train.early_stopping_patience > 0


_BITS = ("quantization.load_in_4bit", "quantization.load_in_8bit")
_WATCH = ("train.load_best_model_at_end", "train.early_stopping_patience")
RULES: tuple[Rule, ...] = (
    Rule(
        "quantization.load_in_8bit",
        _BITS,
        lambda r: r.quantization.load_in_4bit and r.quantization.load_in_8bit,
        "quantization: load_in_4bit and load_in_8bit are both true",
        "keep one of the two",
    ),
    Rule(
        "quantization.parts",
        (*_BITS, "quantization.parts"),
        lambda r: quantized(r) and not r.quantization.parts,
        "quantization.parts: empty, so nothing is quantized",
        "name a part, or take the quantization out",
        ", ".join(PARTS),
    ),
    Rule(
        "export.merge_onto",
        ("export.merge_onto", *_BITS),
        lambda r: r.export.merge_onto == "dequantized" and not quantized(r),
        "export.merge_onto: dequantized, but the base is not quantized",
        "write export.merge_onto: base, or set quantization.load_in_4bit: true",
    ),
    Rule(
        "train.effective_batch_size",
        ("train.effective_batch_size", "train.per_device_train_batch_size"),
        lambda r: (r.train.effective_batch_size or 0) % r.train.per_device_train_batch_size != 0,
        "train.effective_batch_size: {train.effective_batch_size} is not a multiple of per_device_train_batch_size"
        " ({train.per_device_train_batch_size})",
        "change one of the two",
    ),
    Rule(
        "train.gradient_accumulation_steps",
        ("train.effective_batch_size", "train.per_device_train_batch_size", "train.gradient_accumulation_steps"),
        lambda r: (
            r.train.effective_batch_size is not None
            and r.train.gradient_accumulation_steps != 1
            and r.train.effective_batch_size % r.train.per_device_train_batch_size == 0
            and r.train.effective_batch_size
            % (r.train.per_device_train_batch_size * r.train.gradient_accumulation_steps)
            != 0
        ),
        "train.gradient_accumulation_steps: {train.gradient_accumulation_steps} contradicts effective_batch_size"
        " ({train.effective_batch_size}) at {train.per_device_train_batch_size} rows a forward",
        "delete gradient_accumulation_steps; it follows from effective_batch_size",
    ),
    Rule(
        "train.load_best_model_at_end",
        (*_WATCH, "train.eval_steps"),
        lambda r: r.train.load_best_model_at_end and r.train.eval_steps == 0,
        "train.load_best_model_at_end: true, but eval_steps is 0: there is no evaluation to choose by",
        "set train.eval_steps",
    ),
    Rule(
        "train.early_stopping_patience",
        (*_WATCH, "train.eval_steps"),
        lambda r: r.train.early_stopping_patience > 0 and r.train.eval_steps == 0,
        "train.early_stopping_patience: {train.early_stopping_patience}, but eval_steps is 0: there is no evaluation"
        " to stop by",
        "set train.eval_steps",
    ),
    Rule(
        "data.eval",
        (*_WATCH, "data.eval"),
        lambda r: _watches_eval(r) and not r.data.eval,
        "data.eval: missing, but load_best_model_at_end or early_stopping_patience needs evaluation rows",
        "name an evaluation set in data.eval",
    ),
    Rule(
        "evaluate.models",
        ("evaluate.models", "export.merge"),
        lambda r: "merged" in r.evaluate.models and not r.export.merge,
        "evaluate.models: merged, but export.merge is false: there is no merged model",
        "set export.merge: true, or take merged out",
    ),
    Rule(
        "train.bf16",
        ("train.bf16", "model.dtype"),
        lambda r: r.train.bf16 and r.model.dtype == "float16",
        "train.bf16: true, but model.dtype is float16: the two 16-bit types do not mix",
        "write model.dtype: bfloat16, or train.bf16: false",
    ),
    Rule(
        "data.train",
        ("data.train",),
        lambda r: not r.data.train,
        "data.train: empty",
        "name at least one data set",
        "a list of data sets",
    ),
    Rule(
        "evaluate.models", ("evaluate.models",), lambda r: not r.evaluate.models, "evaluate.models: empty", "name one"
    ),
    Rule(
        "evaluate.metrics",
        ("evaluate.metrics",),
        lambda r: not r.evaluate.metrics,
        "evaluate.metrics: empty",
        "name one",
    ),
    Rule(
        "export.max_shard_size",
        ("export.max_shard_size",),
        lambda r: not re.fullmatch(r"[1-9]\d{0,5}(\.\d+)?\s?(KB|MB|GB|KiB|MiB|GiB)", r.export.max_shard_size, re.I),
        "export.max_shard_size: '{export.max_shard_size:.40}' is not a size",
        "write for example 5GB",
        "a number and KB, MB, GB, KiB, MiB or GiB",
    ),
    Rule(
        "name",
        ("name",),
        lambda r: not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", r.name),
        "name: {name!r:.80} cannot be a folder's name",
        "choose another name",
        "up to 100 letters, digits, '.', '_' and '-', starting with a letter or digit",
    ),
    Rule(
        "train.output_dir",
        ("train.output_dir",),
        lambda r: is_below_file(Path(r.train.output_dir)),
        "train.output_dir: '{train.output_dir}' is, or is below, a file",
        "name a folder",
    ),
    *ADAPTER_RULES,
    *OBJECTIVE_RULES,
    *PAIR_RULES,
    *PREFERENCE_RULES,
)


def source_name(source: DataSource) -> str:
    """The name a data set has in reports: its `name`, or its path's stem."""
    return source.name or Path(source.path.removeprefix("shipped:")).stem


def _same_names(recipe: Recipe) -> Iterator[Finding]:
    seen: dict[str, int] = {}
    for index, source in enumerate(recipe.data.eval):
        name, field = source_name(source), f"data.eval.{index}"
        if name in seen:
            what = f"{field}: its name {name[:80]!r} is that of data.eval.{seen[name]}"
            yield Finding(field, what, "give each evaluation set a name of its own")
        seen.setdefault(name, index)


def _repeats(recipe: Recipe) -> Iterator[Finding]:
    lists: dict[str, Sequence[str]] = {
        "adapter.targets": recipe.adapter.targets,
        "adapter.exclude": recipe.adapter.exclude,
        "adapter.modules_to_save": recipe.adapter.modules_to_save,
        "evaluate.models": recipe.evaluate.models,
        "evaluate.metrics": recipe.evaluate.metrics,
        "quantization.parts": recipe.quantization.parts,
    }
    for field, names in lists.items():
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            yield Finding(field, f"{field}: {name[:80]!r} is given twice", "delete one of them")


def _mixture(recipe: Recipe) -> Iterator[Finding]:
    """How often a training set comes is said in one way, and of every set."""
    sets, field = recipe.data.train, "data.train"
    weighed = sum(one.weight is not None for one in sets)
    if 0 < weighed < len(sets):
        yield Finding(field, f"{field}: some sets have a weight and others none", "give every set a weight, or none")
    ways = (weighed > 0, any(one.repeat != 1.0 for one in sets), recipe.data.temperature != 1.0)
    if sum(ways) > 1:
        what = f"{field}: weight, repeat and data.temperature each say how often a set comes"
        yield Finding(field, what, "keep one of the three")


LIST_RULES: tuple[tuple[tuple[str, ...], Callable[[Recipe], Iterator[Finding]]], ...] = (
    (("adapter.targets", "adapter.method"), targets),
    (("adapter.parts", "adapter.targets", "adapter.method"), part_modes),
    (("adapter.method",), unread_fields),
    (("adapter.init_from", "adapter.method"), missing_adapter),
    (("adapter.parts", "adapter.targets", "adapter.method", "quantization"), on_quantized),
    (("data.train", "data.eval"), missing_sources),
    (("data.eval",), _same_names),
    (("data.augmentation",), augmentations),
    (("data.train", "data.temperature"), _mixture),
    (READS, streams),
    (("model.name_or_path",), missing_model),
    (("adapter", "evaluate.models", "evaluate.metrics", "quantization.parts"), _repeats),
)


def _within(field: str, broken: set[str]) -> bool:
    return any(b in ("", field) or field.startswith(b + ".") for b in broken)


def check(recipe: Recipe, root: Node, broken: set[str]) -> list[Problem]:
    """All breaks of the rules. `root` tells the lines; what reads a `broken` place is left out."""

    def problem(field: str, what: str, allowed: str | None, do: str) -> Problem:
        return Problem(what, root.deepest(tuple(field.split(".")))[0].where, allowed, do)

    def sound(*fields: str) -> bool:
        below = (b.startswith(field + ".") for b in broken for field in fields)
        return not any(below) and not any(_within(field, broken) for field in fields)

    found = []
    for rule in RULES:
        if sound(rule.field, *rule.reads) and rule.broken(recipe):
            text = rule.what.format(**{name: getattr(recipe, name) for name in Recipe.model_fields})
            found.append(problem(rule.field, text, rule.allowed, rule.do))
    for reads, findings in LIST_RULES:
        if not any(_within(field, broken) for field in reads):
            found += [problem(h.field, h.what, h.allowed, h.do) for h in findings(recipe) if sound(h.field)]
    return found
