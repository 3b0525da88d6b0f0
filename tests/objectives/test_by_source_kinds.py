"""Loss (online: reward) by data set for every objective: its parts are those of the rows alone, or by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import mmft
from mmft.data.collate import Batch
from mmft.data.masked import MaskedRenderer
from mmft.data.pairs import EXTRA, PairRenderer
from mmft.fusion.heads import counts_of, losses_of
from mmft.objectives.base import StepContext, by_source
from mmft.objectives.build import output_head
from mmft.objectives.classification import ClassificationObjective
from mmft.objectives.contrastive import ContrastiveObjective, contrastive_loss
from mmft.objectives.joint import JointObjective
from mmft.objectives.mlm import MaskedObjective
from mmft.objectives.reward import RewardObjective, make_head
from tests.fast import packs
from tests.fusion.small import small_inputs, small_model
from tests.objectives import pairs
from tests.objectives.answers import tiny_preferences, tiny_renderer
from tests.objectives.joints import tiny_joint
from tests.objectives.online import tries
from tests.objectives.test_contrastive import terms, unit
from tests.objectives.test_mlm import loaded, samples
from tests.runs import read_lines

NAMES = ("a", "b", "a", "c", "b", "a")
NAN = math.nan


def parts_of(logs: Mapping[str, Any], what: str = "loss") -> dict[str, float]:
    return {key.partition(" of ")[2]: float(one) for key, one in logs.items() if key.startswith(f"{what} of ")}


def added(values: list[float], names: tuple[str, ...] = NAMES) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for name, value in zip(names, values, strict=False):
        found[name] += value
    return dict(found)


def step_of(micros: int, count: float) -> StepContext:
    from contextlib import nullcontext

    return StepContext(count, tuple(range(micros)), lambda batch: batch, nullcontext)


# ---------------------------------------------------------------- sums over rows: each row alone is the oracle


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"focal_gamma": 2.0, "class_weights": [0.5, 1.0, 2.0]}, [0, 1, -100, 2, 1, 0]),
        ({"task": "ordinal", "ordinal_rule": "corn"}, [0, 1, -100, 2, 1, 0]),
        ({"task": "ordinal", "ordinal_rule": "cumulative", "class_weights": [0.5, 1.0, 2.0]}, [0, 1, -100, 2, 1, 0]),
        ({"task": "multi_label", "label_smoothing": 0.1}, [[1, 0, NAN], [NAN] * 3, [1, 1, 0], [0, 0, 0]] * 2),
        ({"task": "regression"}, [[1.5, NAN, 0.0], [NAN] * 3, [1.0, 1.0, -2.0], [0.1, 0.2, 0.3]] * 2),
    ],
)
@pytest.mark.parametrize("auxiliary", [0.0, 0.3])
def test_classification(fields, labels, auxiliary):
    model = small_model(auxiliary_weight=auxiliary, **fields)
    wanted = torch.tensor(labels[:6])
    batch = Batch(
        inputs={f"{name}/{key}": one for name, given in small_inputs(rows=6).items() for key, one in given.items()},
        labels=wanted.double() if wanted.is_floating_point() else wanted,
        ids=tuple("123456"),
        supervised=6,
        tokens=6,
        padding=0,
        counted=tuple((name, 1) for name in NAMES),
    )
    objective = ClassificationObjective(model)
    found = objective.loss(model, batch)
    alone, counts = [], []
    for row in range(6):
        one = replace(
            batch,
            inputs={key: value[row : row + 1] for key, value in batch.inputs.items()},
            labels=batch.labels[row : row + 1],
        )
        loss = objective.loss(model, replace(one, counted=()))
        assert not parts_of(loss.logs)
        alone.append(float(loss.sum.detach()))
        counts.append(float(loss.count))
    assert parts_of(found.logs) == pytest.approx(added(alone), rel=1e-9)
    assert parts_of(found.logs, "terms") == added(counts) and sum(counts) == found.count
    assert sum(alone) == pytest.approx(float(found.sum.detach()), rel=1e-9)
    outputs = torch.randn(6, model.config.num_outputs, dtype=torch.float64, requires_grad=True)
    each = losses_of(model.config, outputs, batch.labels)
    assert torch.equal(each == 0, counts_of(model.config, batch.labels) == 0)
    each.sum().backward()
    assert bool(torch.isfinite(outputs.grad).all())


@pytest.mark.parametrize("more", [{}, {"centre_weight": 0.1, "answer_weight": 0.5}])
def test_reward(tmp_path, more):
    model = packs.adapted("llava").model
    rows = [replace(one, source=name) for one, name in zip(tiny_preferences(tmp_path, 4), NAMES, strict=False)]
    head = make_head(model.get_base_model().config.get_text_config().hidden_size)
    torch.nn.init.normal_(head.weight)
    objective = RewardObjective(vocabulary=output_head(model, where="test"), head=head, **more)
    renderer = tiny_renderer()
    found = objective.loss(model, renderer.assemble([(row, 0) for row in rows]))
    alone = [float(objective.loss(model, renderer.assemble([(row, 0)])).sum.detach()) for row in rows]
    assert parts_of(found.logs) == pytest.approx(added(alone), rel=1e-4)
    assert parts_of(found.logs, "terms") == added([1.0] * 4)


def test_hidden_words():
    backbone = loaded("vilt")
    renderer = MaskedRenderer(backbone.processor, max_length=24, seed=3)
    rows = [replace(one, source=name) for one, name in zip(samples(), NAMES, strict=False)]
    objective, model = MaskedObjective(backbone.model), backbone.model.eval()
    found = objective.loss(model, renderer.assemble([(row, 1) for row in rows]))
    alone = [objective.loss(model, renderer.assemble([(row, 1)])) for row in rows]
    assert parts_of(found.logs) == pytest.approx(added([float(one.sum.detach()) for one in alone]), rel=1e-4)
    assert parts_of(found.logs, "terms") == added([float(one.count) for one in alone])


# ---------------------------------------------------------------- every row depends on all others


def test_a_pictures_share_of_infonce_by_hand():
    """Pictures 0 and 3 are one thing of two sets; texts 3 and 7 belong to nothing."""
    left, right = unit(5, 6, 4), unit(9, 6, 5)
    groups = torch.tensor([10, 20, 30, 10, EXTRA])
    texts = torch.tensor([20, 10, 30, EXTRA, 20, 30, 30, EXTRA, 10])
    for kind, bias in (("infonce", 0.0), ("sigmoid", -1.0)):
        given = {"left_groups": groups, "right_groups": texts}
        found = contrastive_loss(left, right, **given, terms=terms(9.0, bias, right=7.0), kind=kind)
        similar = (left @ right.T).tolist()
        shares = [0.0] * 5
        for i in range(5):
            own = [j for j in range(9) if texts[j] == groups[i] and groups[i] != EXTRA]
            if kind == "sigmoid":
                shares[i] = sum(
                    math.log1p(math.exp((-1 if j in own else 1) * (9 * similar[i][j] - 1))) for j in range(9)
                )
                continue
            total = math.log(sum(math.exp(9.0 * similar[i][j]) for j in range(9)))
            shares[i] += sum(total - 9.0 * similar[i][j] for j in own) / max(len(own), 1) / 4 * 4 / 2
        for j in range(9) if kind == "infonce" else ():
            own = [i for i in range(5) if groups[i] == texts[j] and texts[j] != EXTRA]
            total = math.log(sum(math.exp(7.0 * similar[i][j]) for i in range(5)))
            nats = sum(total - 7.0 * similar[i][j] for i in own) / max(len(own), 1)
            for i in own:
                shares[i] += nats / len(own) / 7 * 4 / 2
        assert found.count == 4 and float(found.each.sum()) == pytest.approx(float(found.sum), rel=1e-12)
        assert found.each.tolist() == pytest.approx(shares, rel=1e-10)


def pair_batches(model: Any, processor: Any, sizes: tuple[int, ...], rows: int = 6) -> list[Batch]:
    from mmft.data.formats import load_samples
    from mmft.recipe.schema import DataSource

    found = load_samples(DataSource(path=str(pairs.pair_rows())), seed=0).samples[:rows]
    named = [replace(one, source=name) for one, name in zip(found, NAMES, strict=True)]
    renderer, made, at = PairRenderer(processor, max_length=24), [], 0
    for size in sizes:
        made.append(renderer.assemble([(row, 0) for row in named[at : at + size]]))
        at += size
    return made


def test_contrastive_steps_tell_the_same_in_one_and_in_three_micro_batches():
    from mmft.backbones.load import load_backbone
    from mmft.recipe.schema import ModelSection

    backbone = load_backbone(ModelSection(name_or_path=str(pairs.tiny_dual("clip")), dtype="float32"))
    model = backbone.model.eval().requires_grad_(True)
    objective = ContrastiveObjective(model)
    (whole,) = pair_batches(model, backbone.processor, (6,))
    one = objective.backward(model, [whole], step_of(1, 6.0))
    three = objective.backward(model, pair_batches(model, backbone.processor, (2, 3, 1)), step_of(3, 6.0))
    by_hand = by_source(objective.loss(model, whole).each, whole)
    for found in (one, three):
        assert parts_of(found) == pytest.approx({name: float(x) for name, x in parts_of(by_hand).items()}, rel=1e-5)
        assert sum(parts_of(found).values()) == pytest.approx(found["loss"], rel=1e-6)
        assert parts_of(found, "terms") == {"a": 3.0, "b": 2.0, "c": 1.0}


@pytest.mark.parametrize("weights", [{"contrastive": 1.0, "matching": 0.5, "caption": 2.0}, {"caption": 1.0}])
def test_joint_heads_add_up_and_captions_are_those_of_the_rows_alone(weights):
    from mmft.backbones.load import load_backbone
    from mmft.recipe.schema import ModelSection

    backbone = load_backbone(ModelSection(name_or_path=str(tiny_joint()), dtype="float32"))
    model = backbone.model.eval().requires_grad_(True)
    objective = JointObjective(model, weights=weights, seed=1)
    for sizes in ((6,), (4, 2)):
        found = objective.backward(model, pair_batches(model, backbone.processor, sizes), step_of(len(sizes), 6.0))
        assert sum(parts_of(found).values()) == pytest.approx(found["loss"], rel=1e-5)
        assert parts_of(found, "terms") == {"a": 3.0, "b": 2.0, "c": 1.0}
        if weights == {"caption": 1.0}:
            rows = pair_batches(model, backbone.processor, (1,) * 6)
            alone = [objective.loss(model, row) for row in rows]  # of one picture: its sum over its tokens' mean
            from mmft.objectives.joint import Words, caption_count

            tokens = [caption_count(Words.of(row.inputs)) for row in rows]
            sums = [float(loss.sum.detach()) * count for loss, count in zip(alone, tokens, strict=True)]
            wanted = {name: value * 6.0 / sum(tokens) for name, value in added(sums).items()}
            assert parts_of(found) == pytest.approx(wanted, rel=1e-4)


# ---------------------------------------------------------------- online: rewards


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_online_runs_tell_rewards(tmp_path, name):
    objective, adapted, renderer = tries.tried(tmp_path, name)
    rows = [replace(one, source=set_) for one, set_ in zip(tries.samples(4), NAMES, strict=False)]
    batch = renderer.assemble([(row, 0) for row in rows])
    found = objective.backward(adapted.model, [batch], tries.step(batch))
    rollout = objective._collect(batch, tries.step(batch))  # the same draw: of (seed, step, ids)
    each = rollout.judged.total.double().reshape(4, -1).sum(1).tolist()
    assert parts_of(found, "reward") == pytest.approx(added(each)) and len(set(each)) > 1
    assert parts_of(found, "terms") == added([float(rollout.k)] * 4) and not parts_of(found)
    assert sum(parts_of(found, "reward").values()) == pytest.approx(found["reward"])


# ---------------------------------------------------------------- whole runs


def test_a_resumed_run_tells_what_the_whole_one_told(tmp_path):
    import shutil

    sets = [{"path": str(pairs.pair_rows(20, seed)), "name": f"set{seed}"} for seed in (0, 3)]
    given = pairs.values(tmp_path, {"data.train": sets, "data.eval": [], "export.merge": False})
    mmft.train(given, quiet=True)
    run = tmp_path / "runs" / "pairs"

    def told() -> list[dict[str, float]]:
        rows = [row for row in read_lines(run / "metrics.jsonl") if "loss" in row]
        return [{key: one for key, one in row.items() if key.startswith(("loss", "terms/"))} for row in rows]

    whole = told()
    assert len(whole) == 4
    for row in whole:
        assert row["terms/set0"] + row["terms/set3"] == 16
        total = sum(row[f"loss/{name}"] * row[f"terms/{name}"] for name in ("set0", "set3"))
        assert total / 16 == pytest.approx(row["loss"], rel=1e-5)
    assert "Training loss by data set" in (run / "report.html").read_text()
    for folder in (run / "adapter", run / "checkpoints" / "step-000004"):
        shutil.rmtree(folder)
    (run / "report.json").unlink()
    mmft.train(given, resume=True, quiet=True)
    assert told() == whole
