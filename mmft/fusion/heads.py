"""Heads: outputs (B, O) -> loss as (sum, count), probabilities, decisions.

O is the number of classes or targets, and K - 1 for K ordered classes. Unknown labels (-100, or NaN for multi-label and
regression) count for nothing. Sums are over what `count` counts: see each function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmft.errors import DataError
from mmft.fusion.config import FusionConfig

IGNORED = -100


class Head(nn.Module):
    """`W2 dropout(gelu(W1 z))`, and for cumulative logits one output minus K - 1 ordered thresholds."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.ordered = config.task == "ordinal" and config.ordinal_rule == "cumulative"
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(width, 1 if self.ordered else config.num_outputs)
        if self.ordered:
            self.steps = nn.Parameter(torch.zeros(config.num_outputs))

    def forward(self, vector: Tensor) -> Tensor:
        """(B, D) -> (B, O). Cumulative: `f(z) - c_k`, c_1 = s_1, c_k = c_{k-1} + softplus(s_k)."""
        scores = self.out(self.dropout(F.gelu(self.hidden(vector))))
        if not self.ordered:
            return scores
        gaps = torch.cat((self.steps[:1], F.softplus(self.steps[1:])))
        return scores - gaps.cumsum(dim=0)


def balanced_weights(counts: Sequence[int]) -> list[float]:
    """`N / (C n_c)` per class (King & Zeng 2001; scikit-learn's "balanced"): they average 1 over the training rows.
    Raises DataError for a class without a training row."""
    empty = [index for index, count in enumerate(counts) if count < 1]
    if empty:
        raise DataError(
            f"class(es) {', '.join(map(str, empty))} never occur in training",
            allowed="at least one training row per class",
            do="drop the class from the labels, or add rows of it",
        )
    return [sum(counts) / (len(counts) * count) for count in counts]


def check_labels(config: FusionConfig, labels: Tensor) -> None:
    """Raise DataError for a label outside of the declared set, or of the wrong shape."""
    known = int(config.num_labels or 0)
    if config.task in ("multi_label", "regression"):
        if labels.ndim != 2 or labels.shape[1] != known:
            raise DataError(f"labels of shape {tuple(labels.shape)}", allowed=f"(rows, {known})", do="mend the labels")
        wrong = torch.isinf(labels)
        if config.task == "multi_label":
            wrong |= ~torch.isnan(labels) & (labels != 0) & (labels != 1)
    else:
        wrong = (labels != IGNORED) & ((labels < 0) | (labels >= known))
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        raise DataError(
            f"the label {labels[tuple(at)].item()} is not in the declared set",
            where=f"row {at[0]} of the batch",
            allowed={"multi_label": "0, 1, or NaN for unknown", "regression": "finite numbers, NaN for unknown"}.get(
                config.task, f"0 to {known - 1}, {IGNORED} for unknown"
            ),
            do="mend the label, or declare it",
        )


def counts_of(config: FusionConfig, labels: Tensor) -> Tensor:
    """(B,) what each row adds to the count of `loss_of`, known before any forward: 1 of a labelled row (single label,
    cumulative), its known entries (multi-label, regression), its conditional comparisons (CORN: k with label >= k)."""
    if config.task in ("multi_label", "regression"):
        return (~torch.isnan(labels)).sum(dim=1)
    known = labels != IGNORED
    if config.task == "ordinal" and config.ordinal_rule == "corn":
        return torch.clamp(labels + 1, max=config.num_outputs).masked_fill(~known, 0)
    return known.long()


def count_of(config: FusionConfig, labels: Tensor) -> int:
    """The count of `loss_of`."""
    return int(counts_of(config, labels).sum())


def loss_of(config: FusionConfig, outputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(sum, count): `losses_of` added up."""
    return losses_of(config, outputs, labels).sum(), count_of(config, labels)


def losses_of(config: FusionConfig, outputs: Tensor, labels: Tensor) -> Tensor:
    """(B,) each row's loss in float32, or float64 for float64 outputs; 0 of one without a label. Raises DataError by
    `check_labels`.

    single_label: `-sum_c q_c log p_c`, q = the label smoothed to `(1 - e) [c = y] + e / C`; focal (Lin et al. 2017):
    times `(1 - p_y)^gamma`; class weights: times `w_y`.
    multi_label: binary cross-entropy per class with targets `y (1 - e) + e / 2`; focal by the probability of the truth;
    class weight w_c.
    ordinal, corn (Shi et al. 2021): `f_k = logit P(y > k | y > k - 1)`, binary cross-entropy on rows with y > k - 1.
    ordinal, cumulative (McCullagh 1980): `P(y > k) = sigmoid(f - c_k)`, `-log P(y)`. Class weights w_y in both.
    regression: squared error of the standardised targets.
    """
    check_labels(config, labels)
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    if config.task == "regression":
        known = ~torch.isnan(labels)
        wanted = standardise(config, labels.to(outputs.dtype)).where(known, outputs.detach())
        return ((outputs - wanted) ** 2).sum(dim=1)
    if config.task == "multi_label":
        return _multi_label(config, outputs, labels)
    rows = labels != IGNORED
    outputs, labels = outputs[rows], labels[rows].long()
    weights = outputs.new_tensor(config.class_weights or [1.0] * int(config.num_labels or 0))[labels]
    if config.task == "single_label":
        per_row = F.cross_entropy(outputs, labels, reduction="none", label_smoothing=config.label_smoothing)
        if config.focal_gamma:
            right = torch.log_softmax(outputs, dim=-1).gather(1, labels[:, None]).squeeze(1)
            per_row = per_row * _focus(right, config.focal_gamma)
    elif config.ordinal_rule == "corn":
        ranks = torch.arange(outputs.shape[1], device=outputs.device)
        asked = labels[:, None] >= ranks
        above = (labels[:, None] > ranks).to(outputs.dtype)
        terms = F.binary_cross_entropy_with_logits(outputs, above, reduction="none")
        per_row = terms.masked_fill(~asked, 0.0).sum(dim=1)
    else:
        per_row = -_cumulative_logs(outputs).gather(1, labels[:, None]).squeeze(1)
    return outputs.new_zeros(len(rows)).masked_scatter(rows, per_row * weights)


def probabilities(config: FusionConfig, outputs: Tensor) -> Tensor:
    """(B, C): softmax; sigmoid per class; for ordered classes differences of P(y > k), which CORN multiplies up
    from its conditionals; for regression the targets in their own unit."""
    outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
    if config.task == "single_label":
        return torch.softmax(outputs, dim=-1)
    if config.task == "multi_label":
        return torch.sigmoid(outputs)
    if config.task == "regression":
        mean, std = _targets(config, outputs)
        return outputs * std + mean
    if config.ordinal_rule == "cumulative":
        return _cumulative_logs(outputs).exp()
    above = torch.sigmoid(outputs).cumprod(dim=-1)
    edges = torch.cat((torch.ones_like(above[:, :1]), above, torch.zeros_like(above[:, :1])), dim=-1)
    return edges[:, :-1] - edges[:, 1:]


def decide(config: FusionConfig, outputs: Tensor) -> Tensor:
    """The prediction: class (B,) by the largest probability; (B, C) bool at 0.5; for ordered classes the number of k
    with P(y > k) > 0.5, the median; for regression the targets (B, O)."""
    chances = probabilities(config, outputs)
    if config.task == "single_label":
        return chances.argmax(dim=-1)
    if config.task == "multi_label":
        return chances > 0.5
    if config.task == "regression":
        return chances
    if config.ordinal_rule == "cumulative":
        return (outputs > 0).sum(dim=-1)
    return (torch.sigmoid(outputs.float()).cumprod(dim=-1) > 0.5).sum(dim=-1)


def standardise(config: FusionConfig, targets: Tensor) -> Tensor:
    """Regression targets as the head learns them: `(y - target_mean) / target_std`."""
    mean, std = _targets(config, targets)
    return (targets - mean) / std


def _targets(config: FusionConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    width = config.num_outputs
    return like.new_tensor(config.target_mean or [0.0] * width), like.new_tensor(config.target_std or [1.0] * width)


def _focus(log_right: Tensor, gamma: float) -> Tensor:
    """`(1 - p)^gamma` from log p. At p = 1 exactly and gamma < 1 the derivative of the power is infinite (and 0 times
    infinity is NaN), so 1 - p is held at the smallest normal number or more."""
    return (-torch.expm1(log_right)).clamp_min(torch.finfo(log_right.dtype).tiny) ** gamma


def _multi_label(config: FusionConfig, outputs: Tensor, labels: Tensor) -> Tensor:
    known = ~torch.isnan(labels)
    truth = torch.where(known, labels.to(outputs.dtype), torch.zeros_like(outputs))
    smooth = config.label_smoothing
    terms = F.binary_cross_entropy_with_logits(outputs, truth * (1 - smooth) + smooth / 2, reduction="none")
    if config.focal_gamma:
        terms = terms * _focus(F.logsigmoid(outputs * (2 * truth - 1)), config.focal_gamma)
    if config.class_weights is not None:
        terms = terms * outputs.new_tensor(config.class_weights)
    return terms.masked_fill(~known, 0.0).sum(dim=1)


def _cumulative_logs(outputs: Tensor) -> Tensor:
    """log P(y = k), (B, K), from the falling logits of P(y > k), (B, K - 1).

    `sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))`, which loses no digits in either tail.
    """
    first, last = F.logsigmoid(-outputs[:, :1]), F.logsigmoid(outputs[:, -1:])
    above, below = outputs[:, :-1], outputs[:, 1:]
    gap = (below - above).clamp_max(-torch.finfo(outputs.dtype).eps)  # equal thresholds leave a class no room
    between = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(gap))
    return torch.cat((first, between, last), dim=-1)
