"""Every way to start a run ends in the same bytes; two processes compute what one does."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmft
from tests.runs import (
    BIN,
    TRAIN_ONLY,
    Outcome,
    adapter_sha,
    read_lines,
    run_process,
    stable,
    values,
    workshop,
    write_recipe,
)

CPU = {"ACCELERATE_USE_CPU": "true"}


@functools.cache
def _by_function() -> Path:
    """The run of `mmft.train(...)`, which the others must equal."""
    folder = workshop() / "function"
    mmft.train(write_recipe(folder, TRAIN_ONLY), quiet=True)
    return folder / "runs" / "tiny"


def _same(run: Path, outcome: Outcome) -> None:
    assert outcome.code == 0, outcome.err[-3000:]
    assert adapter_sha(run) == adapter_sha(_by_function())
    assert _losses(run) == _losses(_by_function())


def _losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def test_the_console_script(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TRAIN_ONLY)
    outcome = run_process(BIN / "mmft", "train", recipe, "--json")
    _same(tmp_path / "runs" / "tiny", outcome)
    # Nothing that an imported package prints may land on standard output.
    assert json.loads(outcome.out)["training"]["steps"] == 8


def test_python_m_mmft(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TRAIN_ONLY)
    _same(tmp_path / "runs" / "tiny", stable().run("train", recipe, log=tmp_path / "log", module=True))


def test_a_mapping(tmp_path: Path) -> None:
    mmft.train(values(tmp_path, TRAIN_ONLY), quiet=True)
    assert adapter_sha(tmp_path / "runs" / "tiny") == adapter_sha(_by_function())


def test_accelerate_launch(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TRAIN_ONLY)
    words = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "mmft", "train", recipe]
    _same(tmp_path / "runs" / "tiny", run_process(*words, HF_HOME=str(tmp_path / "home")))


def _torchrun(*words: object, processes: int = 2) -> Outcome:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return run_process(*launch, "-m", "mmft", *words, **CPU)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Gradients are summed in another order (rank by rank), which fp32 rounds differently: equal within rounding."""
    recipe = write_recipe(tmp_path, {**TRAIN_ONLY, "train.dataloader_num_workers": 1})
    outcome = _torchrun("train", recipe)
    assert outcome.code == 0, outcome.err[-3000:]
    run = tmp_path / "runs" / "tiny"
    assert _losses(run) == pytest.approx(_losses(_by_function()), rel=1e-6)
    one, two = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (_by_function(), run))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    facts = json.loads((run / "training.json").read_text())
    assert (facts["steps"], facts["samples"]) == (8, 32)
    assert [event["kind"] for event in read_lines(run / "events.jsonl")].count("open") == 1


def test_two_processes_refuse_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    import os

    from mmft.errors import RecipeError
    from mmft.recipe.load import load_recipe
    from mmft.stages import plan_steps

    recipe = load_recipe(values(tmp_path, {"train.effective_batch_size": 6}))
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert plan_steps(recipe, 16, 1)[0].micro_per_step == 3
    with pytest.raises(RecipeError, match="6 does not divide into 2 processes of per_device_train_batch_size 2"):
        plan_steps(recipe, 16, 2)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one_and_the_other_way_round(tmp_path: Path) -> None:
    changes = {**TRAIN_ONLY, "train.max_steps": 8}
    recipe = write_recipe(tmp_path, changes)
    run = tmp_path / "runs" / "tiny"
    mmft.train(recipe, quiet=True)
    for name in ("adapter", "checkpoints/step-000008"):
        for path in sorted((run / name).iterdir()):
            path.unlink()
        (run / name).rmdir()
    (run / "report.json").unlink()
    outcome = _torchrun("train", recipe, "--resume")
    assert outcome.code == 0, outcome.err[-3000:]
    one, two = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (_by_function(), run))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
