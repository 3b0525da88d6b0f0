"""The command line: cheap verbs stay cheap, every verb works on a tiny model, `--json` is JSON and nothing else."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

import mmft
from tests.runs import (
    REPOSITORY,
    Outcome,
    cli,
    finished,
    hashes,
    model,
    run_process,
    sha256,
    write_recipe,
)

VERBS = ("train", "validate", "plan", "preview", "trace", "inspect", "generate", "evaluate", "report", "merge")
VERBS += ("verify", "data", "combine", "export", "push")
HEAVY = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "matplotlib", "numpy")
MEASURED = """
import json, resource, sys
from unittest import mock
from mmft.cli import main
sys.argv = ["mmft", *sys.argv[1:]]
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code or 0
used = resource.getrusage(resource.RUSAGE_SELF)
modules = sorted({name.split(".")[0] for name in sys.modules})
facts = {"code": code, "seconds": used.ru_utime + used.ru_stime, "modules": modules}
sys.stderr.write("\\n" + json.dumps(facts))
"""


def _ok(*words: object) -> Outcome:
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    return outcome


def _both(*words: object) -> tuple[str, object]:
    """A verb's text, and its values by --json; nothing but them on standard output."""
    return _ok(*words).out, _ok(*words, "--json").json()


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["validate", "RECIPE"], ["validate", "missing.yaml"]]
)
def test_help_and_validate_import_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    given = [str(recipe) if word == "RECIPE" else word for word in words]
    outcome = run_process(sys.executable, "-c", MEASURED, *given)
    facts = json.loads(outcome.err.splitlines()[-1])
    assert facts["code"] == (2 if "missing.yaml" in words else 0)
    assert [name for name in HEAVY if name in facts["modules"]] == []
    assert facts["seconds"] < 0.5


def test_help_names_every_verb() -> None:
    out = _ok("--help").out
    assert [verb for verb in VERBS if f"\n  {verb} " not in out] == []
    for verb in VERBS:
        assert "--json" in _ok(verb, "--help").out


def test_every_verb_of_the_package_stays_a_function_when_all_modules_are_loaded() -> None:
    """A module of a verb's name would take the function's place in the package once it is imported."""
    places = {name for name in mmft.__all__ if importlib.util.find_spec(f"mmft.{name}") is not None}
    assert places == set()
    assert all(callable(getattr(mmft, name)) for name in mmft.__all__)


def test_a_wrong_verb_or_option_is_a_usage_error() -> None:
    for words in (["trian"], ["train"], ["train", "x.yaml", "--wrong"]):
        outcome = cli(*words)
        assert outcome.code == 2 and outcome.out == "" and "Traceback" not in outcome.err


def test_validate(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    text, found = _both("validate", recipe, "train.learning_rate=3e-4")
    assert text == f"{recipe}: a valid recipe for a run named 'tiny'\n"
    assert found["train"]["learning_rate"] == 3e-4
    assert found["train"]["seed"] == 0


def test_plan(tmp_path: Path) -> None:
    text, found = _both("plan", write_recipe(tmp_path))
    assert found["steps"]["total"] == 8
    assert "language" in text and "memory estimate" in text and "steps: 8 of 4 rows" in text
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_preview(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    text, found = _both("preview", write_recipe(tmp_path), "--rows", 3, "--out", page)
    assert found == {"page": str(page)} and text == f"{page}\n"
    assert page.read_text().count("data:image/png;base64,") == 3


def test_trace(tmp_path: Path) -> None:
    text, found = _both("trace", write_recipe(tmp_path), "--row", 1)
    assert all(station["digest"] in text and station["code"] in text for station in found)
    assert found[-1]["station"] == "10 merge"


def test_inspect() -> None:
    text, found = _both("inspect", model(), "--targets", "language.attention")
    assert len(found["targets"]) == 8 and found["model_type"] == "llava"
    assert all(name in text for name in found["targets"])
    assert f"{found['parameters']:,} parameters" in text


def _ask(place: Path, *more: object) -> dict[str, str]:
    picture = finished().predictions()[0]["images"][0]
    question = finished().predictions()[0]["question"]
    words = ["generate", place, "--image", picture, "--question", question, "--max-new-tokens", 6, *more]
    text, found = _both(*words)
    assert isinstance(found, dict) and text == found["answer"] + "\n"
    return found


@pytest.mark.parametrize("which", ["base", "adapter", "merged"])
def test_generate_from_a_run_gives_the_runs_answer(which: str) -> None:
    found = _ask(finished().run, "--which", which)
    assert found["which"] == which
    assert found["answer"] == finished().predictions()[0]["answers"][which]


def test_generate_from_folders() -> None:
    answers = finished().predictions()[0]["answers"]
    merged, adapter, base = finished().run / "merged", finished().run / "adapter", model()
    assert _ask(merged)["answer"] == answers["merged"] == "green"
    assert _ask(adapter)["answer"] == answers["adapter"]
    assert _ask(adapter, "--base", base)["which"] == "adapter"
    assert _ask(base)["which"] == "model"
    assert _ask(finished().run)["which"] == "merged"
    assert isinstance(_ok("generate", base, "--question", "no picture?", "--max-new-tokens", 2).out, str)


def test_generate_from_a_run_of_method_full() -> None:
    found = _ask(finished("full").run)
    assert found["which"] == "adapter"


def test_train_evaluate_report(tmp_path: Path) -> None:
    changes = {"train.max_steps": 2, "evaluate.bootstrap_samples": 50}
    text, found = _both("train", write_recipe(tmp_path, changes), "--overwrite")
    run = tmp_path / "runs" / "tiny"
    assert found == json.loads((run / "report.json").read_text())
    assert "exact_match" in text and "type=warm" in text and "proof: " in text and str(run / "report.html") in text
    page = sha256(run / "report.html")
    (run / "report.html").unlink()
    text, rebuilt = _both("report", run)
    assert rebuilt == {"page": str(run / "report.html")} and sha256(run / "report.html") == page
    text, again = _both("evaluate", run)
    assert again["scores"] == found["scores"] and again["merge"]["proof"] == found["merge"]["proof"]
    assert "exact_match" in text and "proof: " in text


def test_quiet_prints_only_the_result(tmp_path: Path) -> None:
    changes = {"train.max_steps": 1, "data.eval": [], "export.merge": False}
    outcome = _ok("train", write_recipe(tmp_path, changes), "--quiet")
    assert outcome.out.startswith("run tiny\n") and outcome.err == ""


def test_merge_and_verify_of_an_adapter_folder(tmp_path: Path) -> None:
    done, out = finished(), tmp_path / "merged"
    merged = _ok("merge", done.run / "adapter", "--out", out, "--json").json()
    assert merged["proof"]["touched"] == 17
    assert sha256(out / "model.safetensors") == sha256(done.run / "merged" / "model.safetensors")
    text, proof = _both("verify", model(), done.run / "adapter", out)
    assert proof["proof"]["untouched"] == merged["untouched"]
    assert "untouched tensors byte-equal" in text
    again = cli("merge", done.run / "adapter", "--out", out)
    assert again.code in (4, 9) and "exists" in again.err


def test_merge_of_a_run_that_did_not_merge(tmp_path: Path) -> None:
    done, run = finished("nf4"), tmp_path / "run"
    shutil.copytree(done.run, run)
    shutil.rmtree(run / "merged")
    (run / "merge_report.json").unlink()
    found = _ok("merge", run, "--json").json()
    assert found["onto"] == "dequantized" and found["proof"]["outputs"]["checked"]
    assert sha256(run / "merged" / "model.safetensors") == sha256(done.run / "merged" / "model.safetensors")
    before = hashes(run)
    assert "merged 17 of" in _ok("merge", run).out
    other = cli("merge", run, "--onto", "base")
    assert other.code == 9 and "merged/ exists already, onto dequantized" in other.err
    assert hashes(run) == before
    assert cli("merge", run, "--out", tmp_path / "x").code == 2
    assert cli("merge", run, "--onto", "nothing").code == 2


def test_verify_refuses_a_changed_weight(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from mmft.files import write_manifest

    out = tmp_path / "merged"
    shutil.copytree(finished().run / "merged", out)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if "vision" in name)
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_manifest(out)
    outcome = cli("verify", model(), finished().run / "adapter", out)
    assert outcome.code == 9 and name in outcome.err


def test_data(tmp_path: Path) -> None:
    from tests.data.test_scenes import _missing

    if _missing():
        pytest.skip("needs the emoji packages: pip install 'mmft[demo]'")
    found = _ok("data", "emoji-scenes/openmoji-heldout", tmp_path / "scenes", "--rows", 3, "--json").json()
    assert len(Path(found["rows"]).read_text().splitlines()) == 3
    before = hashes(tmp_path)
    assert cli("data", "emoji-scenes/openmoji-heldout", tmp_path / "scenes").code == 3
    assert cli("data", "emoji-scenes/wrong", tmp_path / "other").code == 3
    assert hashes(tmp_path) == before


def test_json_is_alone_on_standard_output_of_a_real_process(tmp_path: Path) -> None:
    """Also where imported packages print by themselves: run from another folder, without a terminal."""
    outcome = run_process(sys.executable, "-m", "mmft", "inspect", "shipped:nano-vlm-init", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["parameters"] > 1e6
    assert REPOSITORY.is_dir()
