"""DeepSpeed's ZeRO-3: what of its settings is read, what is refused, and the file for accelerate's launcher.

What runs compute whose layers it cut up stands in test_ranks.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmft.engine import zero
from mmft.engine.sharding import asked, check_recipe, plain_ranks, refuse_launcher, way
from mmft.errors import RecipeError
from mmft.recipe.load import load_recipe
from tests.runs import REPOSITORY, TRAIN_ONLY, read_lines, run_process, values, write_recipe

CONFIG = REPOSITORY / "recipes" / "accelerate" / "deepspeed_zero3.yaml"
STAGE = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
HOST = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"


@pytest.fixture()
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As accelerate's launcher with ZeRO-3 starts a process, where DeepSpeed is installed."""
    for name, value in STAGE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(zero, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))
    return monkeypatch


def _refused() -> tuple[str, str]:
    with pytest.raises(RecipeError, match="accelerate was configured") as caught:
        refuse_launcher()
    return caught.value.problems[0].where or "", caught.value.problems[0].what


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("DEEPSPEED_ZERO_STAGE", "2", "ZeRO stage 2: stages 1 and 2 cut up optimizer and gradients"),
        ("DEEPSPEED_ZERO3_INIT", "true", "already cut up"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", "optimizer in the host's memory"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "shares on nvme"),
        ("GRADIENT_CLIPPING", "1.0", "the recipe says it"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "the recipe says it"),
    ],
)
def test_what_deepspeed_would_do_elsewhere_is_refused(
    name: str, value: str, why: str, launched: pytest.MonkeyPatch
) -> None:
    refuse_launcher()
    launched.setenv(f"ACCELERATE_{name}", value)
    where, what = _refused()
    assert where == f"ACCELERATE_{name}" and why in what


def test_without_the_package_its_extra_is_named(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(zero.importlib.util, "find_spec", lambda name: None)
    assert _refused() == ("extra deepspeed", "accelerate was configured for DeepSpeed, which is not installed")


def test_without_a_file_a_layer_is_let_go_after_each_use() -> None:
    found = zero.settings(STAGE)["zero_optimization"]
    assert found == {"stage": 3, "stage3_max_reuse_distance": 0, "memory_efficient_linear": False}
    assert zero.settings({**STAGE, HOST: "cpu"})["zero_optimization"]["offload_param"] == {"device": "cpu"}


def _file(path: Path, given: object) -> dict[str, str]:
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    return {zero.FILE: str(path)}


def test_of_a_file_the_part_about_gathering_is_read(tmp_path: Path) -> None:
    section = {"stage": 3, "stage3_max_live_parameters": 5, "stage3_prefetch_bucket_size": "auto", "overlap_comm": True}
    other = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": {"enabled": "auto"},
        "steps_per_print": 9,
    }
    found = zero.settings(_file(tmp_path / "ds.json", {"zero_optimization": section, **other}))
    kept = {"stage": 3, "stage3_max_live_parameters": 5, "overlap_comm": True, "memory_efficient_linear": False}
    assert found == {"train_micro_batch_size_per_gpu": 1, "zero_optimization": kept}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage: 2"),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_quantized_weights: not read by mmft",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param: device nvme"),
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}, "gradient_clipping: the recipe says it"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"params": {"lr": 1.0}}}, "optimizer: the recipe says it"),
        ({"train_batch_size": "auto"}, "cannot be read: KeyError"),
        ("[]", "cannot be read: TypeError"),
        ("{", "cannot be read: JSONDecodeError"),
    ],
)
def test_a_setting_that_would_be_left_out_is_refused(given: object, named: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(named)):
        zero.settings(_file(tmp_path / "ds.json", given))


def test_a_missing_file_is_refused_before_anything_is_loaded(launched: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched.setenv(zero.FILE, str(tmp_path / "none.json"))
    with pytest.raises(RecipeError, match="none.json cannot be read: FileNotFoundError"):
        refuse_launcher()


def test_runs_that_cannot_be_cut_up_name_deepspeed(launched: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="DeepSpeed ZeRO-3 cannot be used here"):
        check_recipe(load_recipe(values(tmp_path, {"objective.name": "dpo"})))


def test_accelerate_sees_plain_ranks_only_while_it_is_set_up(launched: pytest.MonkeyPatch) -> None:
    import os

    with pytest.raises(KeyError), plain_ranks():
        assert zero.SWITCH not in os.environ
        raise KeyError
    assert os.environ[zero.SWITCH] == "true" and way() == "DeepSpeed ZeRO-3"


def test_the_config_asks_for_what_is_trained_with(launched: pytest.MonkeyPatch) -> None:
    """The variables that accelerate's launcher makes of it are accepted."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    given = launch_command_parser().parse_args(["--config_file", str(CONFIG), "-m", "mmft"])
    given.deepspeed_fields_from_accelerate_config = ""
    _, made = prepare_deepspeed_cmd_env(_validate_launch_command(given)[0])
    for name, value in made.items():
        if name.startswith(("ACCELERATE_DEEPSPEED", "ACCELERATE_USE_", "ACCELERATE_GRADIENT")):
            launched.setenv(name, value)
    refuse_launcher()
    assert asked() and not asked(world=1)
    assert zero.settings()["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launch_with_the_config(processes: int, tmp_path: Path) -> None:
    """Two processes over gloo where there is no GPU; one is trained as without a launcher. Standard output is JSON."""
    pytest.importorskip("deepspeed", reason="needs the extra 'deepspeed'")
    recipe = write_recipe(tmp_path, {**TRAIN_ONLY, "train.max_steps": 2})
    words: list[Any] = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG]
    words += ["--num_processes", processes, "--main_process_port", 0, "-m", "mmft", "train", recipe, "--json"]
    outcome = run_process(*words, ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")
    assert outcome.code == 0, outcome.err[-3000:]
    assert json.loads(outcome.out)["training"]["steps"] == 2
    found = [event for event in read_lines(tmp_path / "runs" / "tiny" / "events.jsonl") if event["kind"] == "shards"]
    assert [event["ranks"] for event in found] == [2] * (processes - 1)


def test_the_package_is_named_by_an_extra() -> None:
    assert 'deepspeed = ["deepspeed==' in (REPOSITORY / "pyproject.toml").read_text()
    assert importlib.util.find_spec("deepspeed") is None or zero.wrong(STAGE) == []
