"""An objective from a user's own file, used as a user would; and what is said when the file or the class is wrong."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import mmft
from mmft.errors import RecipeError
from mmft.kinds.custom import find_factory, make_custom
from mmft.objectives.base import StepObjective
from tests.runs import REPOSITORY, TRAIN_ONLY, cli, read_lines, run_process, write_recipe

EXAMPLE = REPOSITORY / "recipes" / "example_objective.py"
SHORT = {**TRAIN_ONLY, "train.max_steps": 2, "train.logging_steps": 1}


def test_the_example_has_forty_lines_and_stands_in_the_readme():
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    assert "--objective recipes/example_objective.py:FocalObjective" in (REPOSITORY / "README.md").read_text()


def test_the_example_trains_from_the_command_line(tmp_path):
    path = write_recipe(tmp_path, SHORT)
    spec = f"{EXAMPLE}:FocalObjective"
    done = run_process(sys.executable, "-m", "mmft", "train", path, "--objective", spec, "--json")
    assert done.code == 0, done.err
    assert done.json()["complete"]
    lines = read_lines(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert all(0 <= line["token_accuracy"] <= 1 and 0 < line["mean_weight"] < 1 for line in lines if "loss" in line)
    other = cli("train", path, "--resume")
    assert other.code == 0  # a finished run has nothing left to train


def test_the_examples_loss_is_the_formula():
    made = find_factory(f"{EXAMPLE}:FocalObjective")(torch.nn.Identity(), None)  # type: ignore[arg-type]
    logits = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.tensor([[-100, 1, 2, -100, 3], [-100, -100, -100, 6, 0]])

    class Model:
        def __call__(self, **_: Any) -> Any:
            return type("Out", (), {"logits": logits})

    batch = type("Batch", (), {"inputs": {}, "labels": labels, "supervised": 5})
    loss = made.loss(Model(), batch)  # type: ignore[arg-type]
    p = logits[:, :-1].softmax(-1)
    wanted = sum(
        -((1 - p[b, t, labels[b, t + 1]]) ** 2) * p[b, t, labels[b, t + 1]].log()
        for b in range(2)
        for t in range(4)
        if labels[b, t + 1] != -100
    )
    torch.testing.assert_close(loss.sum, torch.as_tensor(wanted).float(), rtol=1e-5, atol=1e-6)
    made.gamma = 0.0  # type: ignore[attr-defined]
    plain = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    torch.testing.assert_close(made.loss(Model(), batch).sum, plain.float())  # type: ignore[arg-type]


def test_python_takes_a_class_or_a_function(tmp_path):
    factory: Any = find_factory(f"{EXAMPLE}:FocalObjective")
    report = mmft.train(
        write_recipe(tmp_path, SHORT), objective=lambda model, recipe: factory(model, recipe), quiet=True
    )
    assert report["training"]["steps"] == 2


def test_a_recipe_cannot_name_code(tmp_path):
    path = write_recipe(tmp_path, {**SHORT, "objective.name": f"{EXAMPLE}:FocalObjective"})
    assert cli("validate", path).code == 2


@pytest.mark.parametrize(
    ("spec", "what", "allowed"),
    [
        ("no_such.py:Focal", "no_such.py is not a file", "FILE.py:NAME"),
        ("FocalObjective", "is not a name in a file", "FILE.py:NAME"),
        (f"{EXAMPLE}:Focal", "has no 'Focal'", "FocalObjective"),
        ("{own}:wants_one", "cannot be made", "takes (model, recipe)"),
        ("{own}:Empty", "Empty has no name, metrics, count, loss", "loss(model, batch) -> Loss"),
        ("{own}:Odd", "Odd.loss cannot be called", "count(batch)"),
        ("{own}:Bare", "Bare.loss gave a Tensor, not a Loss", "Loss(sum, count, logs)"),
        ("{own}:Wide", "a sum of shape (2,), not a scalar", "Loss(sum, count, logs)"),
        ("{own}:Fewer", "counted 1, and its count", "count(batch)"),
        ("{own}:Silent", "speaks of hits, which its loss does not log", "metrics"),
        ("{broken}:Any", "cannot be imported: NameError", None),
    ],
)
def test_what_is_wrong_is_said(spec, what, allowed, tmp_path):
    own, broken = tmp_path / "own.py", tmp_path / "broken.py"
    own.write_text(textwrap.dedent(OWN))
    broken.write_text("nothing_of_that_name\n")
    spec = spec.format(own=own, broken=broken)
    found = cli("train", write_recipe(tmp_path, SHORT), "--objective", spec)
    assert found.code == 2, found.err
    assert what in found.err, found.err
    assert all(f"\n  {label} " in found.err for label in ("at", "do")), found.err
    assert allowed is None or allowed in found.err


OWN = """
    import torch
    from mmft.objectives.base import Loss


    def wants_one(model):
        return None


    class Empty:
        def __init__(self, model, recipe):
            pass


    class Odd(Empty):
        name, metrics = "odd", {}

        def count(self, batch):
            return batch.supervised

        def loss(self, model):
            return None


    class Bare(Odd):
        def loss(self, model, batch):
            return model(**batch.inputs).logits.sum()


    class Wide(Bare):
        def loss(self, model, batch):
            return Loss(torch.zeros(2, requires_grad=True), batch.supervised)


    class Fewer(Bare):
        def loss(self, model, batch):
            return Loss(super().loss(model, batch), 1)


    class Silent(Bare):
        metrics = {"accuracy": ("hits", "count")}

        def loss(self, model, batch):
            return Loss(super().loss(model, batch), batch.supervised)
"""


def test_an_objective_of_whole_steps_is_left_alone():
    class Whole:
        name, metrics = "whole", {}  # type: ignore[var-annotated]

        def count(self, batch: Any) -> int:
            return 1

        def loss(self, model: Any, batch: Any) -> Any:
            return None

        def backward(self, model: Any, micros: Any, step: Any) -> dict[str, float]:
            return {}

        def settle(self, weights: Any) -> None:
            return None

    made = Whole()
    assert make_custom(lambda model, recipe: made, torch.nn.Identity(), None) is made  # type: ignore[arg-type,return-value]
    assert isinstance(made, StepObjective)
    with pytest.raises(RecipeError, match="is not a name in a file"):
        find_factory("own.txt:Name")


def test_paths_are_relative_to_where_the_command_is_given(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(Path(EXAMPLE).read_text())
    monkeypatch.chdir(tmp_path)
    assert find_factory("mine.py:FocalObjective").__name__ == "FocalObjective"
