"""The rules about `adapter`: which fields belong to which method, and what does not go together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mmft.errors import choices
from mmft.recipe.methods import COMMON, METHODS, PART_RANKS, readers
from mmft.recipe.ondisk import Finding
from mmft.recipe.rules import PARTS, SUBPARTS, Rule, quantized, target_parts
from mmft.recipe.schema import AdapterSection, Recipe

STARTS = "default, pissa, pissa_niter_N, olora, eva, loftq"
_START = re.compile(r"default|pissa|pissa_niter_[1-9]\d?|olora|eva|loftq")
_BITS = ("quantization.load_in_4bit", "quantization.load_in_8bit")
_UNMERGED = tuple(name for name, method in METHODS.items() if not method.merges)


def _fused(recipe: Recipe) -> bool:
    """Whether B A starts at a part of the weight itself."""
    return recipe.adapter.init_lora_weights.startswith(("pissa", "olora", "loftq"))


ADAPTER_RULES: tuple[Rule, ...] = (
    Rule(
        "adapter.targets",
        ("adapter.targets", "adapter.parts", "adapter.modules_to_save"),
        lambda r: (
            not r.adapter.targets
            and not r.adapter.modules_to_save
            and not any(part.mode == "full" for part in r.adapter.parts.values())
        ),
        "adapter.targets: empty, so nothing would be trained",
        "name a part, for example language.attention",
        ", ".join(PARTS),
    ),
    Rule(
        "adapter.init_lora_weights",
        ("adapter.init_lora_weights",),
        lambda r: not _START.fullmatch(r.adapter.init_lora_weights),
        "adapter.init_lora_weights: '{adapter.init_lora_weights:.80}' is not allowed",
        "give one of them; N is a number of subspace iterations, for example pissa_niter_16",
        STARTS,
    ),
    Rule(
        "adapter.use_dora",
        ("adapter.use_dora", "adapter.init_lora_weights"),
        lambda r: r.adapter.use_dora and _fused(r),
        "adapter.use_dora: true, but with init_lora_weights: {adapter.init_lora_weights} the lengths of the rows would"
        " be those of another weight",
        "take one of the two out; DoRA goes with default and eva",
    ),
    Rule(
        "adapter.init_from",
        ("adapter.init_from", "adapter.init_lora_weights"),
        lambda r: r.adapter.init_from is not None and r.adapter.init_lora_weights != "default",
        "adapter.init_from: the adapter of the folder is the start, so init_lora_weights:"
        " {adapter.init_lora_weights} has no effect",
        "delete one of the two",
    ),
    Rule(
        "adapter.init_from",
        ("adapter.init_from", "adapter.method"),
        lambda r: r.adapter.init_from is not None and r.adapter.method == "full",
        "adapter.init_from: no effect, since adapter.method is full",
        "write model.name_or_path: the folder of the trained model",
    ),
    Rule(
        "adapter.init_lora_weights",
        ("adapter.init_lora_weights", *_BITS),
        lambda r: r.adapter.init_lora_weights == "loftq" and not quantized(r),
        "adapter.init_lora_weights: loftq makes good for the error of quantization, but the base is not quantized",
        "set quantization.load_in_4bit: true, or take loftq out",
    ),
    Rule(
        "export.merge_onto",
        ("adapter.init_lora_weights", "export.merge", "export.merge_onto", *_BITS),
        lambda r: (
            r.adapter.init_lora_weights == "loftq" and quantized(r) and r.export.merge and r.export.merge_onto == "base"
        ),
        "export.merge_onto: base, but an adapter that started with loftq holds the error of quantization, which the"
        " 16-bit base does not have",
        "write export.merge_onto: dequantized",
    ),
    Rule(
        "export.merge",
        ("adapter.method", "export.merge"),
        lambda r: r.export.merge and r.adapter.method in _UNMERGED,
        "export.merge: true, but what adapter.method: {adapter.method} trains cannot become part of the weights",
        "set export.merge: false and evaluate.models: [base, adapter]",
    ),
    Rule(
        "adapter.use_dora",
        ("adapter.use_dora", "quantization.load_in_8bit"),
        lambda r: r.adapter.use_dora and r.quantization.load_in_8bit,
        "adapter.use_dora: true, but bitsandbytes gives the weight of an 8-bit layer away while it trains",
        "use load_in_4bit, or take use_dora out",
    ),
    Rule(
        "model.dtype",
        ("adapter.method", "model.dtype", *_BITS),
        lambda r: (
            r.model.dtype != "float32"
            and (
                (r.adapter.method == "ia3" and quantized(r))
                or (r.adapter.method == "adalora" and r.quantization.load_in_8bit)
            )
        ),
        "model.dtype: {model.dtype}, but peft's {adapter.method} gives float32 out of these quantized layers, which the"
        " 16-bit ones behind them refuse",
        "write model.dtype: float32, or choose another method",
    ),
    Rule(
        "train.memory_budget",
        ("train.memory_budget", "train.gradient_checkpointing"),
        lambda r: r.train.memory_budget is not None and r.train.gradient_checkpointing,
        "train.memory_budget says how many layers to recompute, but train.gradient_checkpointing: true recomputes all",
        "leave out one of the two",
    ),
    Rule(
        "train.memory_budget",
        ("train.memory_budget", "objective.name", "adapter.method"),
        lambda r: r.train.memory_budget is not None and (r.objective.name != "sft" or r.adapter.method == "prefix"),
        "train.memory_budget is only known for answers (objective sft) and methods whose layers can be recomputed; this"
        " is {objective.name} with {adapter.method}",
        "leave it out, or set train.gradient_checkpointing",
    ),
    Rule(
        "train.gradient_checkpointing",
        ("adapter.method", "train.gradient_checkpointing"),
        lambda r: r.train.gradient_checkpointing and r.adapter.method == "prefix",
        "train.gradient_checkpointing: true, but a prefix lives in the key-value cache, which recomputed layers do not"
        " have",
        "set train.gradient_checkpointing: false, or use method: prompt",
    ),
    Rule(
        "model.dtype",
        ("model.dtype", "adapter.method"),
        lambda r: r.adapter.method in ("full", "bitfit") and r.model.dtype == "float16",
        "adapter.method: {adapter.method}, but model.dtype is float16: its updates underflow",
        "write model.dtype: float32 or bfloat16",
    ),
)


def unread_fields(recipe: Recipe) -> Iterator[Finding]:
    """Fields of `adapter` that differ from their default and mean nothing for the method."""
    adapter = recipe.adapter
    reads = METHODS[adapter.method].reads | COMMON
    prompt = METHODS[adapter.method].place == "prompt"
    for name, field in AdapterSection.model_fields.items():
        silent = name not in reads or (prompt and name in ("targets", "layers", "exclude", "parts"))
        value, plain = getattr(adapter, name), field.get_default(call_default_factory=True)
        if silent and value != plain:
            able = [word for word in readers(name) if METHODS[word].place != "prompt" or name not in COMMON]
            yield Finding(
                f"adapter.{name}",
                f"adapter.{name}: no effect, since adapter.method is {adapter.method}",
                "delete the line, or choose another method",
                f"{name} with method {', '.join(able)}",
            )


def targets(recipe: Recipe) -> Iterator[Finding]:
    """Targets that are no part, and sub-parts that a method does not sit on."""
    allowed = [*PARTS, "language.attention", "language.mlp", "vision.attention", "vision.mlp", "all-linear"]
    norms = METHODS[recipe.adapter.method].place == "norms"
    for index, target in enumerate(recipe.adapter.targets):
        part, _, sub = target.partition(".")
        field = f"adapter.targets.{index}"
        if target != "all-linear" and (part not in PARTS or (sub and sub not in SUBPARTS) or target.endswith(".")):
            module = target.endswith(("_proj", "_linear", "proj")) or target in ("qkv", "query_key_value", "fc1", "fc2")
            do = "name parts, not modules, for example language.attention" if module else "correct the target"
            yield Finding(
                field,
                f"{field}: {target[:80]!r} is not a part",
                do,
                choices(allowed, word=None if module else target),
            )
        elif norms and (target == "all-linear" or sub not in ("", "norm")):
            home = "language" if target == "all-linear" else part
            yield Finding(
                field,
                f"{field}: {target} holds no norms, and adapter.method ln_tuning trains nothing else",
                f"write adapter.targets: [{home}.norm]",
            )
            return  # the default holds two of them


def part_modes(recipe: Recipe) -> Iterator[Finding]:
    """Settings of parts that contradict the targets or mean nothing."""
    adapter, named = recipe.adapter, target_parts(recipe)
    for part, own in adapter.parts.items():
        field = f"adapter.parts.{part}"
        if own.mode == "frozen" and part in named:
            yield Finding(field, f"{field}: frozen, but adapter.targets names {part}", "keep one of the two")
        if own.mode == "lora" and part not in named:
            yield Finding(
                field,
                f"{field}: no effect, since adapter.targets does not name {part}",
                f"add {part} to adapter.targets",
            )
        if own.mode == "full" and adapter.method == "bitfit":
            yield Finding(field, f"{field}: mode full, but bitfit saves nothing but biases", "use another method")
        if (own.mode != "lora" or adapter.method not in PART_RANKS) and (own.lora_rank or own.lora_alpha):
            why = f"its mode is {own.mode}" if own.mode != "lora" else f"adapter.method is {adapter.method}"
            yield Finding(field, f"{field}: lora_rank and lora_alpha have no effect: {why}", "delete them")


def on_quantized(recipe: Recipe) -> Iterator[Finding]:
    """Parts that are quantized and cannot be trained like that."""
    if not quantized(recipe):
        return
    method, parts = recipe.adapter.method, recipe.quantization.parts
    modes = {str(part): own.mode for part, own in recipe.adapter.parts.items()}
    do = "train it by lora, or take it out of quantization.parts"
    if not METHODS[method].on_quantized:
        for part in target_parts(recipe):
            if part in parts and modes.get(part, "lora") == "lora":
                yield Finding("adapter.method", f"adapter.method: {method}, but {part} is quantized", do)
    for part, mode in modes.items():
        if mode == "full" and part in parts:
            yield Finding(f"adapter.parts.{part}", f"adapter.parts.{part}: mode full, but {part} is quantized", do)
    for index, name in enumerate(recipe.adapter.modules_to_save):
        part, _, sub = name.partition(".")
        if part in parts and sub in ("", "attention", "mlp"):
            field = f"adapter.modules_to_save.{index}"
            yield Finding(field, f"{field}: {name[:80]} is trained whole, but {part} is quantized", do)


def missing_adapter(recipe: Recipe) -> Iterator[Finding]:
    """An adapter folder to go on from that is not there."""
    folder = recipe.adapter.init_from
    if recipe.adapter.method == "full" or recipe.adapter.init_lora_weights != "default":
        return  # told by the rules already
    if folder is not None and not (Path(folder) / "adapter_config.json").is_file():
        if recipe.adapter.method == "bitfit" and Path(folder).is_dir():
            return
        yield Finding(
            "adapter.init_from",
            f"adapter.init_from: {folder[:200]!r} holds no adapter_config.json",
            "give an adapter folder, for example RUN/adapter; nothing is fetched from the network",
        )
