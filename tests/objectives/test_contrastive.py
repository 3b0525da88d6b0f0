"""Contrastive losses against plain formulas, embeddings against the models' own logits; two passes, one batch."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmft.backbones.classes import model_class
from mmft.data.collate import Batch
from mmft.errors import BackboneError, DataError
from mmft.objectives.base import StepContext, StepObjective
from mmft.objectives.contrastive import (
    EXTRA,
    ContrastiveObjective,
    clamp_scales,
    contrastive_loss,
    give_bias,
)
from mmft.objectives.contrastive_embed import Terms, embed, logit_terms, scales, sides
from mmft.objectives.contrastive_locked import check_locked, lock_towers
from mmft.seeds import fold
from tests.families import kinds_c
from tests.tiny import tiny_vlm

FAMILIES = (
    "clip",
    "siglip",
    "siglip2",
    "align",
    "chinese_clip",
    "altclip",
    "clap",
    "vision-text-dual-encoder",
    "groupvit",
)


def unit(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(values, dim=-1).to(dtype)


def terms(scale: float = 14.0, bias: float = 0.0, *, right: float | None = None) -> Terms:
    values = (scale, scale if right is None else right, bias)
    return Terms(*(torch.tensor(value, dtype=torch.float64) for value in values))


# ---------------------------------------------------------------- the formulas


def test_infonce_is_the_mean_of_two_cross_entropies():
    """open_clip's ClipLoss: labels are the diagonal, half of either direction's mean cross-entropy."""
    left, right, groups = unit(7, 5, 0), unit(7, 5, 1), torch.arange(7)
    got = contrastive_loss(left, right, left_groups=groups, right_groups=groups, terms=terms())
    logits = 14.0 * left @ right.T
    wanted = (F.cross_entropy(logits, groups) + F.cross_entropy(logits.T, groups)) / 2
    assert got.count == 7
    assert abs(float(got.sum) / 7 - float(wanted)) < 1e-12
    assert int(got.logs["correct"]) == int((logits.argmax(1) == groups).sum())


def test_sigmoid_is_the_sum_over_all_pairs():
    """open_clip's SigLipLoss: minus log sigmoid of +1 on the diagonal and -1 elsewhere, over the number of pictures."""
    left, right, groups = unit(6, 5, 2), unit(6, 5, 3), torch.arange(6)
    got = contrastive_loss(
        left, right, left_groups=groups, right_groups=groups, terms=terms(10.0, -4.0), kind="sigmoid"
    )
    wanted = 0.0
    for i in range(6):
        for j in range(6):
            logit = 10.0 * float(left[i] @ right[j]) - 4.0
            wanted += math.log1p(math.exp(-logit if i == j else logit))
    assert abs(float(got.sum) - wanted) < 1e-10
    assert got.count == 6


def test_several_captions_and_hard_negatives_by_hand():
    """Three pictures with one, two and three captions, two texts and a picture that belong to nothing."""
    left, right = unit(4, 6, 4), unit(8, 6, 5)
    left_groups = torch.tensor([10, 20, 30, EXTRA])
    right_groups = torch.tensor([20, 10, 30, EXTRA, 20, 30, 30, EXTRA])
    got = contrastive_loss(left, right, left_groups=left_groups, right_groups=right_groups, terms=terms(9.0, right=7.0))
    images, texts = [], []
    for i in range(3):
        row = [9.0 * float(left[i] @ right[j]) for j in range(8)]
        total = math.log(sum(math.exp(value) for value in row))
        own = [j for j in range(8) if right_groups[j] == left_groups[i]]
        images.append(sum(total - row[j] for j in own) / len(own))
    for j in (0, 1, 2, 4, 5, 6):
        column = [7.0 * float(left[i] @ right[j]) for i in range(4)]
        own = [i for i in range(4) if left_groups[i] == right_groups[j]]
        texts.append(math.log(sum(math.exp(value) for value in column)) - column[own[0]])
    wanted = (sum(images) / 3 + sum(texts) / 6) / 2
    assert got.count == 3
    assert abs(float(got.sum) / 3 - wanted) < 1e-12
    sig = contrastive_loss(
        left, right, left_groups=left_groups, right_groups=right_groups, terms=terms(9.0, -1.0), kind="sigmoid"
    )
    by_hand = 0.0
    for i in range(4):
        for j in range(8):
            logit = 9.0 * float(left[i] @ right[j]) - 1.0
            same = left_groups[i] == right_groups[j] and left_groups[i] != EXTRA
            by_hand += math.log1p(math.exp(-logit if same else logit))
    assert abs(float(sig.sum) - by_hand) < 1e-10


def test_float32_is_near_float64():
    """1e-5: what float32 leaves of a sum of 32 x 32 terms of size one."""
    groups = torch.arange(32)
    for kind, bias in (("infonce", 0.0), ("sigmoid", -10.0)):
        values = [
            contrastive_loss(
                unit(32, 16, 6, dtype),
                unit(32, 16, 7, dtype),
                left_groups=groups,
                right_groups=groups,
                terms=Terms(*(torch.tensor(value, dtype=dtype) for value in (20.0, 20.0, bias))),
                kind=kind,
            )
            for dtype in (torch.float32, torch.float64)
        ]
        one, other = (float(value.sum) / value.count for value in values)
        assert abs(one - other) < 1e-5 * abs(other)


def test_hidden_negatives_raise_the_loss():
    left, right, groups = unit(5, 6, 8), unit(5, 6, 9), torch.arange(5)
    plain = contrastive_loss(left, right, left_groups=groups, right_groups=groups, terms=terms())
    hard = contrastive_loss(
        left,
        torch.cat((right, left)),  # texts that lie on the pictures themselves
        left_groups=groups,
        right_groups=torch.cat((groups, torch.full((5,), EXTRA))),
        terms=terms(),
    )
    assert float(hard.sum) > float(plain.sum)


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        ([0, 1], [0, 2], "1 rows of the pictures belong to a group without a text"),
        ([0], [0, 2], "1 rows of the texts belong to a group without a picture"),
        ([EXTRA], [EXTRA], "no picture belongs to a pair"),
    ],
)
def test_rows_without_a_partner_are_refused(left, right, text):
    with pytest.raises(DataError, match=text):
        contrastive_loss(
            unit(len(left), 4, 0),
            unit(len(right), 4, 1),
            left_groups=torch.tensor(left),
            right_groups=torch.tensor(right),
            terms=terms(),
        )


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_values_and_gradients_are_those_of_open_clip(kind):
    losses = pytest.importorskip("open_clip.loss", reason="pip install 'mmft[test]' brings open_clip_torch")
    groups, bias = torch.arange(9), -3.0 if kind == "sigmoid" else 0.0
    found = []
    for ours in (True, False):
        sides_ = [unit(9, 6, seed).requires_grad_() for seed in (10, 11)]
        scale, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (12.0, bias))
        if ours:
            given = Terms(scale, scale, shift)
            loss = contrastive_loss(*sides_, left_groups=groups, right_groups=groups, terms=given, kind=kind)
            value = loss.sum / loss.count
        elif kind == "infonce":
            value = losses.ClipLoss()(*sides_, scale)
        else:
            value = losses.SigLipLoss()(*sides_, scale, shift)
        value.backward()
        learned = [*sides_, scale, *([shift] if kind == "sigmoid" else [])]
        found.append([value.detach(), *(one.grad for one in learned)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=0.0, atol=1e-12)


# ---------------------------------------------------------------- the models


@functools.cache
def _family(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model whose rows differ clearly, so that a mixed up row or scale is seen."""
    tiny = kinds_c.KINDS[name]()
    torch.manual_seed(0)
    model = (tiny.cls or model_class(tiny.config))(tiny.config).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.1)
        for value in scales(model).values():
            value.add_(0.25)
    return model, tiny.inputs


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_embeddings_give_the_models_own_logits(name):
    """Equal within fp32 rounding of a dot product: 1e-6 of the largest logit."""
    model, inputs = _family(name)
    out = model(**inputs)
    left, right = sides(model)
    ours, texts = embed(model, inputs, left), embed(model, inputs, right)
    found = logit_terms(model)
    for name_of, similar, factor in (
        (f"logits_per_{left}", ours @ texts.T, found.left),
        ("logits_per_text", texts @ ours.T, found.right),
    ):
        wanted = out[name_of]
        assert wanted.std() > 0
        assert (similar * factor + found.bias - wanted).abs().max() <= 1e-6 * max(1.0, float(wanted.abs().max()))
    assert set(scales(model)) <= {"logit_scale", "logit_bias", "logit_scale_a", "logit_scale_t", "temperature"}


@pytest.mark.parametrize("name", [name for name in FAMILIES if "siglip" not in name])
@torch.no_grad()
def test_text_padding_may_be_cut(name):
    """A row padded to eight tokens more gives the vector of the row without them: rounding of fp32 sums."""
    model, inputs = _family(name)
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = getattr(model.config.text_config, "eos_token_id", None) or 2
    pad = model.config.text_config.pad_token_id or 0
    longer = torch.cat([ids, torch.full((2, 8), pad)], dim=1)
    short = embed(model, {"input_ids": ids, "attention_mask": torch.ones(2, 6, dtype=torch.long)}, "text")
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 8)], dim=1).long()
    whole = embed(model, {"input_ids": longer, "attention_mask": mask}, "text")
    assert float((short - whole).abs().max()) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_locked_towers_keep_every_family_exact(name):
    """Each side's features are the bits they are without memory."""
    model, inputs = _family(name)
    model.requires_grad_(False)
    one = {key: value[:1] for key, value in inputs.items()}
    plain = {side: embed(model, one, side) for side in sides(model)}
    towers = lock_towers(model)
    try:
        assert [tower.side for tower in towers] == list(sides(model))
        for tower in towers:
            check_locked(model, tower, one)
            assert torch.equal(embed(model, one, tower.side), plain[tower.side])
            assert tower.hits and tower.misses == 1
    finally:
        for tower in towers:
            tower.release()


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_loss_is_the_models_own(name):
    """transformers' own contrastive losses divide by the rows as we do."""
    model, inputs = _family(name)
    objective = ContrastiveObjective(model, kind="sigmoid" if name == "siglip" else "infonce")
    got = objective.loss(model, _batch(inputs, [0, 1]))
    with torch.no_grad():
        wanted = model(**inputs, return_loss=True).loss
    assert abs(float(got.sum.detach()) / got.count - float(wanted)) < 1e-6 * max(1.0, float(wanted))


def test_a_model_that_writes_is_refused():
    with pytest.raises(BackboneError, match="LlavaForConditionalGeneration is no dual encoder"):
        ContrastiveObjective(tiny_vlm("llava")[0])


def test_sigmoid_without_a_bias_is_refused_and_can_be_given_one():
    tiny = kinds_c.KINDS["clip"]()
    model = model_class(tiny.config)(tiny.config)
    with pytest.raises(BackboneError, match="sigmoid loss needs a bias, and CLIPModel has no logit_bias"):
        ContrastiveObjective(model, kind="sigmoid")
    bias = give_bias(model)
    assert give_bias(model) is bias
    objective = ContrastiveObjective(model, kind="sigmoid")
    objective.loss(model, _batch(tiny.inputs, [0, 1])).sum.backward()
    assert bias.grad is not None and float(bias.grad.abs()) > 0


def test_scales_are_held_at_one_hundred():
    weights = {
        "base_model.model.logit_scale": torch.tensor(5.0),
        "logit_scale_t": torch.tensor(1.0),
        "temperature": torch.tensor(0.001),
        "logit_bias": torch.tensor(-200.0),
        "layer.weight": torch.tensor(300.0),
    }
    clamp_scales(weights)
    assert torch.equal(weights["base_model.model.logit_scale"], torch.tensor(math.log(100.0)))
    assert weights["logit_scale_t"] == 1.0 and weights["temperature"] == 0.01
    assert weights["logit_bias"] == -200.0 and weights["layer.weight"] == 300.0


# ---------------------------------------------------------------- two passes against one batch


def _batch(inputs: dict[str, torch.Tensor], left: list[int], right: list[int] | None = None) -> Batch:
    groups = {"left_groups": torch.tensor(left), "right_groups": torch.tensor(left if right is None else right)}
    return Batch({**inputs, **groups}, torch.zeros(0), tuple(map(str, left)), len(left), 0, 0)


def _micros(model: Any, sizes: list[int], *, captions: int = 2, negatives: int = 1) -> list[Batch]:
    """Micro-batches of several sizes, with `captions` texts a picture and hard negatives among the texts."""
    source = torch.Generator().manual_seed(5)
    config = model.config
    found, first = [], 0
    for size in sizes:
        left = list(range(first, first + size))
        first += size
        right = [group for group in left for _ in range(captions)] + [EXTRA] * negatives
        side = config.vision_config.image_size
        inputs = {
            "pixel_values": torch.randn(size, 3, side, side, generator=source),
            "input_ids": torch.randint(3, 300, (len(right), 8), generator=source),
            "attention_mask": torch.ones(len(right), 8, dtype=torch.long),
        }
        found.append(_batch(inputs, left, right))
    return found


def _joined(micros: list[Batch]) -> Batch:
    inputs = {key: torch.cat([batch.inputs[key] for batch in micros]) for key in micros[0].inputs}
    return Batch(inputs, torch.zeros(0), sum((batch.ids for batch in micros), ()), 0, 0, 0)


def _context(micros: list[Batch], *, seeds: tuple[int, ...] = (), rank: int = 0, world: int = 1) -> StepContext:
    return StepContext(
        count=sum(int((batch.inputs["left_groups"] != EXTRA).sum()) for batch in micros),
        seeds=seeds or tuple(range(len(micros))),
        place=lambda batch: batch,
        autocast=contextlib.nullcontext,
        rank=rank,
        world=world,
    )


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of the largest gradient of each parameter (and of the size of rounding for vanishing ones)."""
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        limit = 1e-5 * max(float(wanted.abs().max()), 1e-2)
        assert float((ours[name] - wanted).abs().max()) <= limit, name


@pytest.mark.parametrize("name", ["clip", "siglip", "vision-text-dual-encoder"])
def test_two_passes_equal_one_large_batch(name):
    model, _ = _family(name)
    model.requires_grad_(True)
    objective = ContrastiveObjective(model, kind="sigmoid" if name == "siglip" else "infonce")
    assert isinstance(objective, StepObjective)
    micros = _micros(model, [3, 2, 4])
    sums = objective.backward(model, micros, _context(micros))
    ours = _gradients(model)
    loss = objective.loss(model, _joined(micros))
    (loss.sum / loss.count).backward()
    assert abs(sums["loss"] - float(loss.sum.detach())) <= 1e-5 * float(loss.sum.detach())
    assert sums["correct"] == float(loss.logs["correct"])
    assert set(scales(model)) <= ours.keys()
    _near(ours, _gradients(model))


def _with_dropout() -> Any:
    tiny = kinds_c.KINDS["vision-text-dual-encoder"]()
    for section in (tiny.config.vision_config, tiny.config.text_config):
        section.hidden_dropout_prob = section.attention_probs_dropout_prob = 0.3
    torch.manual_seed(1)
    return model_class(tiny.config)(tiny.config).train()


def _held(model: Any, objective: Any, micros: list[Batch], seeds: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """All graphs held at once: every side of every micro-batch drawn from its own seed, one loss, one backward."""
    parts: dict[str, list[torch.Tensor]] = {"image": [], "text": []}
    for seed, batch in zip(seeds, micros, strict=True):
        for side in ("image", "text"):
            torch.manual_seed(fold(seed, side))
            parts[side].append(embed(model, batch.inputs, side))
    whole = _joined(micros).inputs
    loss = objective.matched(
        model, torch.cat(parts["image"]), torch.cat(parts["text"]), whole["left_groups"], whole["right_groups"]
    )
    (loss.sum / loss.count).backward()
    return _gradients(model)


@pytest.mark.parametrize("sizes", [[2, 3], [4]])
def test_dropout_is_replayed(sizes):
    model = _with_dropout()
    objective = ContrastiveObjective(model)
    micros, seeds = _micros(model, sizes), (11, 12)[: len(sizes)]
    objective.backward(model, micros, _context(micros, seeds=seeds))
    ours, theirs = _gradients(model), _held(model, objective, micros, seeds)
    _near(ours, theirs)
    objective.backward(model, micros, _context(micros, seeds=(13, 12)))
    other = _gradients(model)
    assert any(float((other[name] - theirs[name]).abs().max()) > 1e-3 for name in theirs)


def test_a_locked_tower_is_embedded_once():
    model, _ = _family("clip")
    model.requires_grad_(True)
    model.vision_model.requires_grad_(False)
    model.visual_projection.requires_grad_(False)
    calls = {"vision": 0, "text": 0}
    hooks = [
        model.vision_model.register_forward_hook(lambda *_: calls.__setitem__("vision", calls["vision"] + 1)),
        model.text_model.register_forward_hook(lambda *_: calls.__setitem__("text", calls["text"] + 1)),
    ]
    micros = _micros(model, [2, 2, 2])
    ContrastiveObjective(model).backward(model, micros, _context(micros))
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    model.requires_grad_(True)
    # The first micro-batch of the second pass shows that nothing is trained there.
    assert calls == {"vision": 4, "text": 6}


_RANK = """
import sys, torch
import torch.distributed as dist
from tests.objectives.test_contrastive import _family, _micros, _context, _gradients, ContrastiveObjective
rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:" + port, rank=rank, world_size=2)
torch.set_num_threads(1)
for kind in ("clip", "siglip"):
    model, _ = _family(kind)
    model.requires_grad_(True)
    micros = _micros(model, [3, 2, 4, 1])
    context = _context(micros)
    own = micros[rank::2]
    context = type(context)(context.count, tuple(range(rank, 4, 2)), context.place, context.autocast, rank, 2)
    objective = ContrastiveObjective(model, kind="sigmoid" if kind == "siglip" else "infonce")
    sums = objective.backward(model, own, context)
    torch.save({"sums": sums, "gradients": _gradients(model)}, f"{out}/{kind}-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_equal_one(tmp_path):
    """Two real processes over gloo, rows of unequal number: one rank's loss, and its gradients in sum."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(rank), port, str(tmp_path)],
            cwd=root,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    for kind in ("clip", "siglip"):
        model, _ = _family(kind)
        model.requires_grad_(True)
        micros = _micros(model, [3, 2, 4, 1])
        objective = ContrastiveObjective(model, kind="sigmoid" if kind == "siglip" else "infonce")
        sums = objective.backward(model, micros, _context(micros))
        wanted = _gradients(model)
        found = [torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2)]
        assert abs(found[0]["sums"]["loss"] - sums["loss"]) <= 1e-5 * sums["loss"]
        assert found[1]["sums"] == {"loss": 0.0, "correct": 0.0}
        ours, theirs = (one["gradients"] for one in found)
        _near({name: sum(one[name] for one in (ours, theirs) if name in one) for name in {*ours, *theirs}}, wanted)
