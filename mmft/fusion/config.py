"""What a fusion model is built from: encoders by modality, a table, a strategy, a head. Plain data, saved as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mmft.errors import RecipeError, choices

KINDS = ("text", "image", "video", "audio")
STRATEGIES = ("early", "late", "hybrid", "weighted", "gated", "cross_attention", "low_rank")
POOLINGS = ("mean", "cls", "attention", "bilstm")
TASKS = ("single_label", "multi_label", "ordinal", "regression")
LATE_RULES = ("average", "learned", "stacking")
ORDINAL_RULES = ("corn", "cumulative")
TABLE = "table"
"""The name of the tabular modality."""
TAKEN = (TABLE, "tabular", "head", "modality_head", "missing", "strategy")
"""Names that no encoder's modality can have: peft finds a module that is trained whole by the end of its name."""


class FusionConfig(PreTrainedConfig):
    """Configuration of `FusionModel`.

    encoders: a list (saved dicts lose their order) of {"name", "kind": one of KINDS, "config": a transformers config as
    dict with its "model_type"}.
    table: {"numeric": [{"name", "mean", "std"}], "categorical": [{"name", "values"}]} or None (`tabular.TableSchema`).
    strategy, pooling, task, late_rule, ordinal_rule: names above; `id2label`: the classes, or the targets.
    hidden_size, num_layers, num_heads, dropout: of the fusion (an encoder keeps its own); rank: of low-rank fusion.
    class_weights: one per class, None = 1; focal_gamma: 0 = off; label_smoothing in [0, 1).
    target_mean, target_std: regression targets are learned standardised, predictions come in their own unit.
    modality_dropout: probability that a row loses a modality in training; auxiliary_weight: of per-modality losses.
    """

    model_type = "mmft_fusion"

    encoders: list[dict[str, Any]] | None = None
    table: dict[str, Any] | None = None
    strategy: str = "early"
    pooling: str = "mean"
    task: str = "single_label"
    late_rule: str = "average"
    ordinal_rule: str = "corn"
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    rank: int = 8
    dropout: float = 0.1
    class_weights: list[float] | None = None
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    target_mean: list[float] | None = None
    target_std: list[float] | None = None
    modality_dropout: float = 0.0
    auxiliary_weight: float = 0.0
    initializer_range: float = 0.02

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities in the order in which they are fused; the table comes last."""
        return (*(entry["name"] for entry in self.encoders or ()), *((TABLE,) if self.table is not None else ()))

    @property
    def num_outputs(self) -> int:
        """Width of the head: one per class or target; K - 1 thresholds for K ordered classes."""
        labels = int(self.num_labels or 0)
        return labels - 1 if self.task == "ordinal" else labels

    def check(self) -> None:
        """Raise RecipeError for every value that no model can be built from, all at once by the first one found."""
        _check_modalities(self)
        _one_of(self, "strategy", STRATEGIES)
        _one_of(self, "pooling", POOLINGS)
        _one_of(self, "task", TASKS)
        _one_of(self, "late_rule", LATE_RULES)
        _one_of(self, "ordinal_rule", ORDINAL_RULES)
        _check_head(self)
        _within(self, "modality_dropout")
        _within(self, "dropout")
        if self.hidden_size % (2 * self.num_heads):
            raise RecipeError(
                f"hidden_size {self.hidden_size} is no multiple of 2 x {self.num_heads} heads",
                where="hidden_size",
                do="choose a hidden_size that 2 * num_heads divides",
            )


def encoder_config(entry: Mapping[str, Any]) -> Any:
    """The transformers config of one entry of `encoders`. Raises RecipeError for an unknown model type."""
    given = dict(entry["config"])
    kind = str(given.pop("model_type", ""))
    given.pop("dtype", None)  # the loader's dtype decides for the whole model
    try:
        # Through from_dict: some configs (timm's) turn their labels around only there.
        return type(AutoConfig.for_model(kind)).from_dict(given)
    except ValueError as error:
        raise RecipeError(
            f"the encoder of '{entry['name']}' has model type '{kind}', which transformers does not know",
            where=f"encoders.{entry['name']}.config.model_type",
            do="give the config of a transformers encoder",
        ) from error


def _check_modalities(config: FusionConfig) -> None:
    if not config.modalities:
        raise RecipeError(
            "a fusion model needs at least one modality", where="encoders", do="add an encoder or a table"
        )
    for entry in config.encoders or ():
        name = entry["name"]
        if name in TAKEN or not name.isidentifier() or config.modalities.count(name) > 1:
            raise RecipeError(
                f"'{name}' cannot be the name of an encoder's modality",
                where="encoders",
                allowed=f"letters, digits and underscores, each name once, none of {', '.join(TAKEN)}",
                do="rename it",
            )
        if entry.get("kind") not in KINDS:
            raise RecipeError(
                f"'{entry.get('kind')}' is no kind of modality",
                where=f"encoders.{name}.kind",
                allowed=choices(KINDS, word=str(entry.get("kind"))),
                do="use one of the allowed kinds",
            )


def _check_head(config: FusionConfig) -> None:
    labels = int(config.num_labels or 0)
    least = 1 if config.task in ("multi_label", "regression") else 2
    if labels < least:
        raise RecipeError(
            f"a {config.task} head with {labels} label(s)", where="num_labels", allowed=f"at least {least}",
            do="give the labels (id2label)",
        )  # fmt: skip
    if config.class_weights is not None:
        usable = len(config.class_weights) == labels and all(0 <= w < float("inf") for w in config.class_weights)
        if not usable or config.task == "regression":
            raise RecipeError(
                f"class_weights {config.class_weights} for a {config.task} head of {labels}",
                where="class_weights",
                allowed="one finite weight, 0 or more, per class; none for regression",
                do="leave them out, or use mmft.fusion.heads.balanced_weights",
            )
    _within(config, "label_smoothing")
    if config.task in ("ordinal", "regression") and (config.focal_gamma or config.label_smoothing):
        raise RecipeError(
            f"focal_gamma and label_smoothing have no meaning for a {config.task} head",
            where="focal_gamma, label_smoothing",
            allowed="single_label and multi_label",
            do="set both to 0",
        )
    if not 0.0 <= config.focal_gamma < float("inf"):
        raise RecipeError("focal_gamma must be 0 or more", where="focal_gamma", do="2 is the paper's choice")
    stacked = config.strategy == "late" and config.late_rule == "stacking"
    if stacked and config.task == "ordinal" and config.ordinal_rule == "cumulative":
        raise RecipeError(
            "stacking does not keep cumulative logits in order",
            where="late_rule",
            allowed="average, learned; or ordinal_rule: corn",
            do="set ordinal_rule: corn",
        )


def _one_of(config: FusionConfig, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in allowed:
        raise RecipeError(
            f"'{value}' is no {field}", where=field, allowed=choices(allowed, word=str(value)), do="use one of these"
        )


def _within(config: FusionConfig, field: str, *, low: float = 0.0, high: float = 1.0) -> None:
    value = getattr(config, field)
    if not low <= value < high:
        raise RecipeError(
            f"{field} is {value}", where=field, allowed=f"{low} up to, not including, {high}", do="change it"
        )
