"""A classifier or regressor over text, pictures, videos, sound and tables, as a `PreTrainedModel` like any other.

encoders -> projection to one width -> missing vectors for what a row lacks -> strategy -> head. Only rows that have a
modality pass through its encoder, so that what stands in the place of a missing one never matters (not even by way of a
batch norm). Some weights get no gradient in a step (missing vectors, an encoder's own pooler).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.utils import ModelOutput

from mmft.errors import DataError, choices
from mmft.fusion.config import TABLE, FusionConfig, encoder_config
from mmft.fusion.encoders import ModalityEncoder, build_tower, tower_of
from mmft.fusion.features import Features, drop_modalities, scatter_rows
from mmft.fusion.heads import Head, count_of, losses_of
from mmft.fusion.late import LateFusion
from mmft.fusion.layers import Pooling
from mmft.fusion.strategies import STRATEGY_CLASSES, EarlyFusion, LowRankTensor, WeightedSum
from mmft.fusion.tabular import CategoryTable, TableSchema, TabularEncoder

Inputs = Mapping[str, Mapping[str, Tensor]]
_MASKS = ("attention_mask", "frame_mask", "mask")


@dataclass
class FusionOutput(ModelOutput):
    """What `FusionModel` returns: `logits` (B, O); `loss_sum` (with the auxiliary losses) and `loss_count`, and `loss`
    = sum / count; `row_losses` (B,), whose sum is `loss_sum`; `modality_logits` (B, M, O) where modalities have heads;
    `vector` (B, D), None for late fusion; `present` (B, M), what each row was seen with (after modality dropout)."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_sum: Tensor | None = None
    loss_count: Tensor | None = None
    row_losses: Tensor | None = None
    modality_logits: Tensor | None = None
    vector: Tensor | None = None
    present: Tensor | None = None


def _projection(own: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(own), nn.Linear(own, width))


class MissingVectors(nn.Module):
    """What each modality's features are in a row that lacks it: one learned vector per modality, (M, D)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(count, width))

    def forward(self, at: int) -> Tensor:
        """(D,) of modality number `at`."""
        return self.vectors[at]

    def drop(self, present: Tensor, probability: float) -> Tensor:
        """Modality dropout while these vectors are trained; here because an adapter run puts only what it trains into
        training, not the whole model."""
        return drop_modalities(present, probability) if self.training and probability else present


class FusionModel(PreTrainedModel):
    """See the module and `FusionConfig`. `model(modalities=..., present=..., labels=...)`."""

    config_class = FusionConfig
    config: FusionConfig
    main_input_name = "modalities"
    input_modalities = ["text", "image", "video", "audio"]
    _supports_sdpa = True

    def __init__(self, config: FusionConfig) -> None:
        config.check()
        super().__init__(config)
        width = config.hidden_size
        self.encoders = nn.ModuleDict(
            {
                entry["name"]: ModalityEncoder(build_tower(encoder_config(entry), entry["kind"]), entry["kind"])
                for entry in config.encoders or ()
            }
        )
        if config.table is not None:
            self.tabular = TabularEncoder(TableSchema.from_config(config.table), width)
        # The norm evens out encoders of very different scales; a table's tokens are of this width already.
        self.projections = nn.ModuleDict(
            {
                name: _projection(int(encoder.width), width)  # type: ignore[arg-type]
                for name, encoder in self.encoders.items()
            }
        )
        self.missing = MissingVectors(len(config.modalities), width)
        self.pools = nn.ModuleDict({name: Pooling(self._pooling(name), width) for name in config.modalities})
        if config.strategy != "late":
            self.strategy = STRATEGY_CLASSES[config.strategy](config)
            self.head = Head(config)
        if config.strategy in ("late", "hybrid") or config.auxiliary_weight:
            self.modality_head = LateFusion(config)
        self.post_init()

    @classmethod
    def from_encoders(cls, config: FusionConfig, encoders: Mapping[str, tuple[str, Any]]) -> FusionModel:
        """A model over pretrained transformers models: modality name -> (kind, model). `config.encoders` is filled in
        from them; the fusion starts at random (global torch seed)."""
        config.encoders = [
            {"name": name, "kind": kind, "config": tower_of(model, kind).config.to_dict()}
            for name, (kind, model) in encoders.items()
        ]
        made = cls(config)
        for name, (kind, model) in encoders.items():
            made.encoders[name] = ModalityEncoder(tower_of(model, kind), kind)
        return made

    def _pooling(self, name: str) -> str:
        """`cls` only where the encoder has such a token; grids, sound, videos and tables are averaged instead."""
        without = name == TABLE or not self.encoders[name].has_cls
        return "mean" if self.config.pooling == "cls" and without else self.config.pooling

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            initialization.xavier_uniform_(module.weight)
            if module.bias is not None:
                initialization.zeros_(module.bias)
            return
        # Called for modules that own weights themselves, never for containers.
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, TabularEncoder):
            initialization.normal_(module.weight)
            initialization.normal_(module.bias)
            initialization.zeros_(module.absent)
        elif isinstance(module, CategoryTable):
            initialization.normal_(module.weight)
        elif isinstance(module, EarlyFusion):
            initialization.normal_(module.types, std=std)
            if hasattr(module, "front"):
                initialization.normal_(module.front, std=std)
        elif isinstance(module, LowRankTensor):
            start = torch.randn(module.factors.shape) / self.config.hidden_size**0.5
            start[:, :, -1] = 1.0
            initialization.copy_(module.factors, start.to(module.factors))
            initialization.constant_(module.mix, 1.0 / self.config.rank)
            initialization.zeros_(module.bias)
        elif isinstance(module, WeightedSum | LateFusion) and hasattr(module, "weights"):
            initialization.zeros_(module.weights)
        elif isinstance(module, LateFusion) and module.rule == "stacking":
            average = module.average().to(module.stack_weight)
            initialization.copy_(module.stack_weight, average)
            initialization.zeros_(module.stack_bias)
        elif isinstance(module, Head) and module.ordered:
            initialization.zeros_(module.steps)
        elif isinstance(module, MissingVectors):
            initialization.normal_(module.vectors, std=std)

    def train(self, mode: bool = True) -> FusionModel:
        """A frozen encoder stays in evaluation: no dropout, and its batch norms keep their statistics."""
        super().train(mode)
        for encoder in self.encoders.values():
            if not any(parameter.requires_grad for parameter in encoder.parameters()):
                encoder.eval()
        return self

    def get_encoder(self, modality: str | None = None) -> Any:
        """The first tower of "image", "video" or "audio" (of text without a modality); None without one."""
        wanted = modality or "text"
        return next((one.tower for one in self.encoders.values() if one.kind == wanted), None)

    def get_decoder(self) -> Any:
        """The text encoder, which stands where other multimodal models have their language model; None without one."""
        return self.get_encoder()

    def get_input_embeddings(self) -> Any:
        """The text encoder's token table; None without a text encoder."""
        text = self.get_encoder()
        return None if text is None else text.get_input_embeddings()

    def encode(self, name: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """An encoder's tokens (B, T, D_m) and mask for a whole batch, to be cached: a frozen encoder's are given back
        to `forward` as `{"features": tokens, "mask": mask}` in the place of the modality's inputs."""
        return self.encoders[name](inputs)

    def features(self, name: str, inputs: Mapping[str, Tensor] | None, present: Tensor) -> Features:
        """One modality of a batch in the common width; `present` (B,) bool."""
        rows = present.nonzero().flatten()
        vector = self.missing(self.config.modalities.index(name))
        if len(rows):
            assert inputs is not None, "forward has seen to that"
            held = {key: value[rows] for key, value in inputs.items()}
            if name == TABLE:
                found, inner = self.tabular(held)
            else:
                found, inner = (held["features"], held["mask"]) if "features" in held else self.encode(name, held)
                found = self.projections[name](found.to(vector.dtype)).masked_fill(~inner.unsqueeze(-1), 0.0)
            tokens, mask = (scatter_rows(value, rows, len(present)) for value in (found, inner))
        else:
            tokens = vector.new_zeros(len(present), 1, len(vector))
            mask = torch.zeros(len(present), 1, dtype=torch.bool, device=vector.device)
        first = torch.zeros_like(mask)
        first[:, 0] = ~present
        tokens = torch.where(first.unsqueeze(-1), vector, tokens)
        return Features(tokens, mask | first, present, self.pools[name](tokens, mask | first))

    def forward(
        self,
        modalities: Inputs,
        present: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
    ) -> FusionOutput:
        """modalities: name -> the inputs of its encoder (`ModalityEncoder.forward`; "table": `TableSchema.encode`) of B
        rows; a modality that no row has may be left out. present: name -> (B,) bool, all true where not given; a row
        whose attention or frame mask is empty does not have the modality. labels: see `heads`.

        Raises DataError for unknown or inconsistent modalities and for labels outside of the declared set.
        """
        there = self._present(modalities, present)
        there = self.missing.drop(there, self.config.modality_dropout)
        features = [
            self.features(name, modalities.get(name), there[:, at]) for at, name in enumerate(self.config.modalities)
        ]
        late = getattr(self, "modality_head", None)
        own = late.outputs(features) if late is not None else None
        vector = self.strategy(features) if self.config.strategy != "late" else None
        logits = self.head(vector) if vector is not None else None
        if self.config.strategy in ("late", "hybrid"):
            logits = late.combine(own, there, logits)  # type: ignore[union-attr]
        result = FusionOutput(logits=logits, modality_logits=own, vector=vector, present=there)
        if labels is not None:
            labels = labels.to(there.device)
            result.row_losses = self._losses(logits, own, there, labels=labels)
            result.loss_sum, count = result.row_losses.sum(), count_of(self.config, labels)
            result.loss_count, result.loss = torch.tensor(count), result.loss_sum / max(count, 1)
        return result

    def _losses(self, logits: Any, own: Tensor | None, there: Tensor, *, labels: Tensor) -> Tensor:
        """(B,) the head's losses plus `auxiliary_weight` times those of each modality's own head where a row has it."""
        total = losses_of(self.config, logits, labels)
        if self.config.auxiliary_weight and own is not None:
            for at in range(there.shape[1]):
                rows = there[:, at]
                part = self.config.auxiliary_weight * losses_of(self.config, own[rows, at], labels[rows])
                total = total.index_add(0, rows.nonzero().flatten(), part)
        return total

    def _present(self, modalities: Inputs, present: Mapping[str, Tensor] | None) -> Tensor:
        """(B, M) bool on the model's device."""
        names = self.config.modalities
        for name in (*modalities, *(present or {})):
            if name not in names:
                raise DataError(
                    f"the model knows no modality '{name}'", allowed=choices(names, word=name), do="rename or remove it"
                )
        sizes = {len(value) for inputs in modalities.values() for value in inputs.values()}
        sizes |= {len(value) for value in (present or {}).values()}
        if len(sizes) != 1:
            raise DataError(
                f"the modalities of a batch have {sorted(sizes)} rows",
                allowed="one number of rows for all inputs and for `present`",
                do="give every modality all rows, with `present` false where a row lacks it",
            )
        rows, device = sizes.pop(), self.device
        columns = []
        for name in names:
            inputs = modalities.get(name)
            given = (present or {}).get(name, torch.full((rows,), inputs is not None))
            column = given.to(device=device, dtype=torch.bool)
            if inputs is None and bool(column.any()):
                raise DataError(f"rows have '{name}' but the batch does not", do="give its inputs, or present = False")
            for key in _MASKS:
                if inputs is not None and key in inputs:
                    column = column & inputs[key].to(device).any(dim=1)
            columns.append(column)
        return torch.stack(columns, dim=1)
