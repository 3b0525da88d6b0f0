"""What classification over fused modalities reads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmft.recipe.section import Positive, Rate, Section


class ClassificationFields(Section):
    """Fields of a fusion model: its head, how modalities are joined, and what is done about uneven classes."""

    task: Literal["single_label", "multi_label", "ordinal", "regression"] = "single_label"
    """The head. Several labels of a row stand in one cell, separated by `|`; `|` alone is a row without any."""
    classes: tuple[str, ...] = ()
    """The declared labels (their order is that of ordinal labels); those of the training rows if not given."""
    strategy: Literal[
        "early",
        "late_average",
        "late_learned",
        "late_stacking",
        "hybrid",
        "weighted",
        "gated",
        "cross_attention",
        "low_rank",
    ] = "late_learned"
    """How the modalities become one answer; `late_` says how the answers of the modalities are joined."""
    pooling: Literal["mean", "cls", "attention", "bilstm"] = "mean"
    """How the tokens of a modality become one vector; `bilstm` reads them in their order."""
    hidden_size: Positive = 64
    """Width of the fusion; its transformers (`early`, `hybrid`, `cross_attention`) have one layer, dropout is 0.1."""
    modality_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Chance of a row to lose a modality in a training step; a row keeps one."""
    auxiliary_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of a loss for each modality alone, against a lazy one."""
    modality_learning_rates: dict[str, Rate] = {}
    """Peak learning rates of what belongs to one modality: its encoder's adapters, projection and own head."""
    balance: Literal["none", "weights", "sampling"] = "none"
    """Against uneven classes. `weights`: a row counts N / (C n_c), n_c rows of its class among N; `sampling`: rows of
    smaller classes are repeated until all classes are of one size."""
    focal_gamma: Annotated[float, Field(ge=0.0)] = 0.0
    """Exponent of the focal loss; 0 switches it off."""
    cache_features: bool | None = None
    """Compute the tokens of encoders that nothing trains once for each row; false: anew in every step, true: refuse a
    run that trains an encoder."""
