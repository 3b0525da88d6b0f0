"""Whole runs of online RL on tiny models: they learn, report, resume to the same bytes, and stop where they must."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import mmft
from mmft.errors import CheckpointError, DataError, RecipeError
from mmft.recipe.load import load_recipe
from tests import runs
from tests.objectives.online.tries import changes
from tests.runs import adapter_sha, read_lines, stable, wait_for_step, workshop

LONG = {**runs.TRAIN_ONLY, "train.max_steps": 12, "train.save_steps": 3}


def written(folder: Path, name: str, more: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(runs.values(folder, changes(name, **(more or {}))), sort_keys=False))
    return path


def steps_of(run: Path) -> list[dict]:
    left = ("samples_per_second", "first_sampler_gap")
    rows = [row for row in read_lines(run / "metrics.jsonl") if "reward" in row]
    return [{key: value for key, value in row.items() if key not in left} for row in rows]


@functools.cache
def finished(name: str) -> tuple[Path, dict]:
    folder = workshop() / f"online-{name}"
    more = {"train.max_steps": 25, "train.eval_steps": 10, "train.save_steps": 0, "train.learning_rate": 2e-2}
    more |= {"objective.num_generations": 6, "objective.kl_coef": 1e-3}
    report = mmft.train(written(folder, name, more), quiet=True)
    return folder / "runs" / "tiny", report


@functools.cache
def whole(name: str) -> Path:
    folder = workshop() / f"online-whole-{name}"
    mmft.train(written(folder, name, LONG), quiet=True)
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_a_run_earns_more_reward_merges_and_is_watched(name):
    run, report = finished(name)
    rows = steps_of(run)
    first, last = (sum(row["reward"] for row in part) / len(part) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1
    watch = report["online"]
    assert watch["sampler_gap"]["largest_at_start"] < 1e-3
    assert {"reward", "score", "kl", "entropy", "answer_tokens", "equal_groups"} <= set(watch)
    held = [row for row in read_lines(run / "metrics.jsonl") if "eval_score" in row]
    assert [row["step"] for row in held] == [10, 20, 25]
    assert all(row["eval_loss"] == pytest.approx(1 - row["eval_score"]) and "eval_reward" in row for row in held)
    assert report["merge"]["proof"]["untouched"] and set(report["scores"]) == {"base", "adapter", "merged"}
    page = (run / "report.html").read_text()
    for words in ("Reward and true score", "KL from the base", "Entropy of the policy", "Sampled answers", "held-out"):
        assert words in page
    assert json.loads((run / "report.json").read_text())["complete"]


def test_the_value_head_is_kept_with_the_run_and_not_exported():
    run, report = finished("ppo")
    kept = load_file(run / "adapter" / "value_head.safetensors")
    assert set(kept) == {"weight", "bias"} and float(kept["weight"].abs().max()) > 0
    assert not any("value" in name for name in load_file(run / "adapter" / "adapter_model.safetensors"))
    assert not list(run.glob("merged/*value*")) and ["head", "value"] in [
        row[:2] for row in report["training"]["parts"]
    ]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_kill_and_a_signal_change_nothing(name, tmp_path):
    recipe, run = written(tmp_path, name, LONG), tmp_path / "runs" / "tiny"
    pid = stable().start("train", recipe, "--quiet", log=tmp_path / "log")
    wait_for_step(run, 4)
    os.kill(pid, signal.SIGKILL)
    assert stable().wait(pid) == -signal.SIGKILL
    pid = stable().start("train", recipe, "--quiet", "--resume", log=tmp_path / "log")
    wait_for_step(run, 7)
    os.kill(pid, signal.SIGTERM)
    assert stable().wait(pid) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    mmft.train(recipe, resume=True, quiet=True)
    assert adapter_sha(run) == adapter_sha(whole(name)) and steps_of(run) == steps_of(whole(name))
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        place = Path("checkpoints") / "step-000012" / file
        assert (run / place).read_bytes() == (whole(name) / place).read_bytes()


@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo"])
def test_two_processes_sample_and_learn_the_same(name, tmp_path):
    """Up to the rounding of sums over other batches: the answers, their rewards and the losses are those of one."""
    sets = [{"path": str(runs.rows(8, at)), "name": f"set{at}"} for at in range(2)]
    more = {**LONG, "train.max_steps": 3, "objective.kl_coef": 0.01, "data.train": sets}
    mmft.train(written(tmp_path / "one", name, more), quiet=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    recipe = written(tmp_path / "two", name, more)
    outcome = runs.run_process(*launch, "-m", "mmft", "train", recipe, ACCELERATE_USE_CPU="true")
    assert outcome.code == 0, outcome.err
    one, two = (steps_of(tmp_path / which / "runs" / "tiny") for which in ("one", "two"))
    assert len(one) == len(two) == 3
    for left, right in zip(one, two, strict=True):
        told = {key for key in left if key.startswith(("reward/", "terms/"))}
        assert len(told) >= 2
        for key in ("reward", "score", "answer_tokens", "equal_groups", *told):
            assert left[key] == pytest.approx(right[key], abs=1e-6), key
        for key in ("loss", "kl", "entropy", "grad_norm"):
            assert left[key] == pytest.approx(right[key], abs=1e-3, rel=1e-3), key


def test_a_reward_of_the_users_own(tmp_path):
    """It takes the place of the recipe's; a run that it stopped does not go on with another one."""
    code = tmp_path / "mine.py"
    code.write_text(
        "seen = []\n\n\ndef vowels(attempt):\n    seen.append(attempt)\n    assert len(seen) <= 40\n"
        "    return 2 + sum(letter in 'aeiou' for letter in attempt.text)\n"
    )
    recipe, mine = written(tmp_path, "grpo", {**LONG, "train.save_steps": 1}), ["--reward", f"{code}:vowels", "--quiet"]
    stopped = runs.cli("train", recipe, *mine)
    assert stopped.code == DataError.exit_code and "reward 'vowels' raised AssertionError" in stopped.err
    assert any(row["reward"] > 1 for row in steps_of(tmp_path / "runs" / "tiny"))  # a share of exact answers never is
    code.write_text(code.read_text().replace("aeiou", "xyz"))
    refused = runs.cli("train", recipe, "--resume", *mine)
    assert refused.code == CheckpointError.exit_code and "reward vowels" in refused.err
    with pytest.raises(RecipeError, match="has no 'vovels'"):
        mmft.train(recipe, rewards=[f"{code}:vovels"], quiet=True)
    with pytest.raises(RecipeError, match="cannot be called"):
        mmft.train(recipe, rewards=[lambda: 0.0], quiet=True)


def test_a_reward_that_fails_stops_with_the_samples_id(tmp_path):
    def broken(attempt):
        raise KeyError("score")

    with pytest.raises(DataError, match=r"reward 'broken' raised KeyError[\s\S]*sample "):
        mmft.train(written(tmp_path, "grpo", LONG), rewards=[broken], quiet=True)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("grpo", {"objective.num_generations": 1}, "compares answers to the same question"),
        ("grpo", {"objective.rewards": {}}, "no answer is better"),
        ("grpo", {"objective.rewards": {"exact": 1.0}}, "names something that is no reward"),
        ("grpo", {"objective.rewards": {"format:": 1.0}}, "names something that is no reward"),
        ("grpo", {"adapter.lora_dropout": 0.1}, "sampled without dropout"),
        ("grpo", {"data.supervise": "last_answer"}, "in the place of a row's last one"),
        ("ppo", {"adapter.method": "bitfit"}, "keeps its value head beside an adapter"),
        ("rloo", {"objective.kl_coef": 0.1, "adapter.method": "full"}, "none to switch off"),
        ("grpo", {"objective.gae_lambda": 0.5}, "grpo does not read it"),
        ("rloo", {"objective.variant": "dapo"}, "rloo does not read it"),
        ("ppo", {"adapter.method": "prefix"}, "not sampled from"),
    ],
)
def test_what_cannot_work_is_refused(name, change, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, name, change))


def test_it_is_planned_and_traced(tmp_path):
    recipe = written(tmp_path, "ppo")
    plan = mmft.plan(recipe)
    assert plan["tokens"]["all"]
    stations = {row["station"] for row in mmft.trace(recipe)}
    assert {"6 collate", "7 objective", "8 loop"} <= stations
