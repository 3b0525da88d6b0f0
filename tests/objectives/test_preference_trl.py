"""Values equal TRL's on the same logits; the trainers' own loss functions are called, without a trainer around them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from mmft.objectives.preference import PreferenceObjective, Settings
from tests.objectives.answers import fixed_batch

pytest.importorskip("trl")

ROWS, LENGTH, WORDS = 4, 7, 11
LIMIT = {"rtol": 0.0, "atol": 1e-5}


class Fixed(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Identity()
        self.states = logits

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.states))


def case() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(WORDS, (2 * ROWS, LENGTH), generator=draw)
    mask = torch.zeros_like(ids)
    for row in range(2 * ROWS):
        mask[row, 2 : 4 + row % 3] = 1
    logits = 2 * torch.randn(2 * ROWS, LENGTH, WORDS, generator=draw)
    reference = -6 * torch.rand(2 * ROWS, generator=draw)
    return {"ids": ids, "mask": mask, "logits": logits, "reference": reference}


def token_logps(one: dict[str, Any]) -> torch.Tensor:
    logps = one["logits"][:, :-1].log_softmax(-1).gather(-1, one["ids"][:, 1:, None])[..., 0]
    return logps * one["mask"][:, 1:]


def ours(one: dict[str, Any], **settings: Any) -> float:
    model = Fixed(one["logits"])
    objective = PreferenceObjective(Settings(**settings), head=model.head, reference=lambda batch: one["reference"])
    if objective.name in ("orpo", "simpo", "cpo"):
        objective.reference = None
    loss = objective.loss(model, fixed_batch(one["ids"], one["mask"], good=[1, 0, 0, 1]))
    return float(loss.sum) / loss.count


def trainer(**known: Any) -> MagicMock:
    """What stands around a loss function in a trainer, on one process."""
    made = MagicMock()
    made.accelerator.device = torch.device("cpu")
    made.accelerator.gather = made.accelerator.gather_for_metrics = lambda value: value
    for name, value in {"aux_loss_enabled": False, "_tp_size": 1, "_total_train_tokens": 0, **known}.items():
        setattr(made, name, value)
    return made


def outputs(one: dict[str, Any], rows: slice = slice(None)) -> Any:
    zero = torch.zeros(len(one["ids"][rows]), LENGTH - 1)
    return SimpleNamespace(log_probs=token_logps(one)[rows], entropy=zero, mean_logits=zero, is_top1=zero.bool())


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm"])
def test_dpo_family(loss_type: str) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    one = case()
    smoothing = 0.1 if loss_type == "robust" else 0.0
    around = trainer(
        beta=0.3,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        use_weighting=False,
    )
    inputs = {"input_ids": one["ids"], "completion_mask": one["mask"], "attention_mask": torch.ones_like(one["ids"])}
    inputs |= {"ref_chosen_logps": one["reference"][:ROWS], "ref_rejected_logps": one["reference"][ROWS:]}
    wanted = float(DPOTrainer._compute_loss(around, lambda **_: outputs(one), inputs, False))
    found = ours(one, beta=0.3, loss_type=loss_type, label_smoothing=smoothing)
    assert found == pytest.approx(wanted, rel=0, abs=LIMIT["atol"])


def test_kto() -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    one = case()
    sums = token_logps(one).sum(-1)
    around = trainer(
        beta=0.3,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        desirable_weight=1.2,
        undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: sums[ROWS:],
    )
    inputs = {
        "input_ids": one["ids"][:ROWS],
        "completion_mask": one["mask"][:ROWS],
        "attention_mask": torch.ones(ROWS, LENGTH),
        "label": torch.tensor([1, 0, 0, 1]),
        "ref_logps": one["reference"][:ROWS],
        "ref_KL_logps": one["reference"][ROWS:],
    }
    wanted = float(KTOTrainer._compute_loss(around, lambda **_: outputs(one, slice(ROWS)), inputs, False))
    found = ours(one, name="kto", beta=0.3, desirable_weight=1.2, undesirable_weight=0.7)
    assert found == pytest.approx(wanted, rel=0, abs=LIMIT["atol"])


def test_orpo() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    one = case()
    means = token_logps(one).sum(-1) / one["mask"].sum(-1)
    odds = ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), means[:ROWS], means[ROWS:])[0]
    wanted = float((-means[:ROWS] - odds).mean())
    assert ours(one, name="orpo", beta=0.3) == pytest.approx(wanted, rel=0, abs=LIMIT["atol"])


@pytest.mark.parametrize("name", ["simpo", "cpo"])
def test_simpo_and_cpo(name: str) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    one = case()
    logps = token_logps(one).sum(-1)
    means = logps / one["mask"].sum(-1)
    used = means if name == "simpo" else logps
    around = trainer(
        beta=2.0,
        alpha=0.0,
        simpo_gamma=0.5,
        label_smoothing=0.0,
        loss_type="simpo" if name == "simpo" else "sigmoid",
    )
    wanted = float(CPOTrainer.cpo_loss(around, used[:ROWS], used[ROWS:])[0].mean())
    assert ours(one, name=name, beta=2.0, gamma=0.5) == pytest.approx(wanted, rel=0, abs=LIMIT["atol"])
