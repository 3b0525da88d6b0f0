"""Every way to start a run ends in the same bytes; two processes compute what one does."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import mmft
from mmft.data.sample import Sample
from mmft.data.steps import plan_steps
from mmft.engine.sharding import asked, check_recipe, refuse_launcher
from mmft.errors import RecipeError
from mmft.recipe.load import load_recipe
from mmft.recipe.schema import TrainSection
from mmft.stages import make_accelerator
from tests.runs import (
    BIN,
    REPOSITORY,
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
    """Byte for byte where each has one micro-batch a step: the sum of two gradients does not depend on their order."""
    recipe = write_recipe(tmp_path, {**TRAIN_ONLY, "train.dataloader_num_workers": 1})
    run = tmp_path / "runs" / "tiny"
    _same(run, _torchrun("train", recipe))
    facts = json.loads((run / "training.json").read_text())
    assert (facts["steps"], facts["samples"]) == (8, 32)
    assert [event["kind"] for event in read_lines(run / "events.jsonl")].count("open") == 1


CONFIGS = sorted((REPOSITORY / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_are_what_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}[path.stem]
    assert found.num_processes == 2 and str(found.distributed_type).endswith(kind)


def test_the_config_for_fsdp2_asks_for_what_is_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that accelerate's launcher makes of it are accepted."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = REPOSITORY / "recipes" / "accelerate" / "fsdp2.yaml"
    given = launch_command_parser().parse_args(["--config_file", str(path), "-m", "mmft"])
    made = prepare_multi_gpu_env(_validate_launch_command(given)[0])
    chosen = {name: value for name, value in made.items() if name.startswith(("FSDP_", "ACCELERATE_USE_"))}
    assert chosen["ACCELERATE_USE_FSDP"] == "true" and chosen["FSDP_VERSION"] == "2"
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    refuse_launcher()
    assert asked() and not asked(world=1)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"USE_DEEPSPEED": "true"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
        ({"USE_FSDP": "true", "VERSION": "1"}, "FSDP_VERSION"),
        ({"USE_FSDP": "true"}, "FSDP_VERSION"),
        ({"USE_FSDP": "true", "VERSION": "2", "OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
        ({"USE_FSDP": "true", "VERSION": "2", "CPU_RAM_EFFICIENT_LOADING": "true"}, "FSDP_CPU_RAM_EFFICIENT_LOADING"),
    ],
)
def test_other_ways_to_cut_weights_up_are_refused(
    changes: dict[str, str], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(f"ACCELERATE_{name}" if name.startswith("USE_") else f"FSDP_{name}", value)
    with pytest.raises(RecipeError, match="accelerate was configured") as caught:
        make_accelerator(TrainSection())
    assert caught.value.problems[0].where == where


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"quantization.load_in_4bit": True}, "quantization"),
        ({"objective.name": "dpo"}, "objective.name"),
        ({"adapter.method": "adalora"}, "adapter.method"),
        ({"adapter.init_lora_weights": "pissa"}, "adapter.init_lora_weights"),
    ],
)
def test_runs_that_cannot_be_cut_up_say_why(changes: dict[str, object], where: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="FSDP2 cannot be used here") as caught:
        check_recipe(load_recipe(values(tmp_path, changes)))
    assert caught.value.problems[0].where == where
    check_recipe(load_recipe(values(tmp_path)))


def _near(one: Path, two: Path) -> None:
    """Losses within 1e-6 of each other (relative), weights within 1e-5."""
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-6)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


@pytest.mark.slow
def test_two_processes_of_two_micro_batches_a_step(tmp_path: Path) -> None:
    """Gradients are summed in another order (by rank), which fp32 rounds differently: equal within rounding."""
    changes = {**TRAIN_ONLY, "train.effective_batch_size": 8}
    mmft.train(write_recipe(tmp_path / "one", changes), quiet=True)
    outcome = _torchrun("train", write_recipe(tmp_path / "two", changes))
    assert outcome.code == 0, outcome.err[-3000:]
    _near(tmp_path / "one" / "runs" / "tiny", tmp_path / "two" / "runs" / "tiny")


def test_two_processes_refuse_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    recipe = load_recipe(values(tmp_path, {"train.effective_batch_size": 6}))
    samples = [Sample(id=str(number), turns=(), source="rows") for number in range(16)]
    assert plan_steps(recipe, samples, 1)[0].micro_per_step == 3
    with pytest.raises(RecipeError, match="6 does not divide into 2 processes of per_device_train_batch_size 2"):
        plan_steps(recipe, samples, 2)


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_has_begun(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, TRAIN_ONLY)
    run = tmp_path / "runs" / "tiny"
    mmft.train(recipe, quiet=True)
    for folder in (run / "adapter", run / "checkpoints" / "step-000008"):
        shutil.rmtree(folder)
    (run / "report.json").unlink()
    outcome = _torchrun("train", recipe, "--resume")
    assert "resumed at step 6" in outcome.err
    _same(run, outcome)
