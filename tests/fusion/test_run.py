"""A fusion run from recipe to report on made rows with tiny encoders."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import load_file

import mmft
from mmft.data.speech import tone, write_wav
from mmft.errors import DataError, RecipeError
from mmft.fusion import FusionModel, FusionProcessor
from mmft.fusion.store import FeatureStore
from mmft.kinds.fusion import oversampled, with_rates
from mmft.recipe.load import load_recipe
from tests.fusion.small import ENCODERS, SIDE
from tests.fusion.test_processor import tokenizer
from tests.runs import run_process

WORDS = ("a red dog", "dogs run")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny encoders with their processors, and rows whose label is told by two of three modalities."""
    home = tmp_path_factory.mktemp("fusion")
    torch.manual_seed(0)
    for name in ("bert", "vit", "whisper"):
        given = ENCODERS[name][1] | ({"max_source_positions": 50} if name == "whisper" else {})  # of one second
        config = transformers.AutoConfig.for_model(**given)
        transformers.AutoModel.from_config(config).save_pretrained(home / name)
    tokenizer().save_pretrained(home / "bert")
    transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(home / "vit")
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(home / "whisper")
    (home / "media").mkdir()
    for part, count in (("train", 48), ("test", 24)):
        write_rows(home, part, count)
    return home


def write_rows(home: Path, part: str, count: int) -> None:
    rng = np.random.default_rng(len(part))
    with (home / f"{part}.jsonl").open("w") as out:
        for at in range(count):
            word, colour, high = (int(value) for value in rng.integers(0, 2, 3))
            Image.new("RGB", (SIDE, SIDE), (250 * colour, 20, 250 * (1 - colour))).save(
                home / "media" / f"{part}{at}.png"
            )
            write_wav(home / "media" / f"{part}{at}.wav", tone(np.full(3000, 2000.0 if high else 200.0)))
            row = {
                "id": f"{part}{at}",
                "note": None if at % 11 == 5 else WORDS[word],
                "photo": f"media/{part}{at}.png",
                "sound": None if at % 7 == 3 else f"media/{part}{at}.wav",
                "age": None if at % 5 == 0 else float(rng.normal(50, 10)),
                "ward": ["north", "south"][at % 2],
                "y": ("none", "one", "both")[word + colour],
            }
            out.write(json.dumps(row) + "\n")


def recipe(home: Path, out: Path, **changes):
    """A recipe on the made rows; `changes` by section."""
    given = {
        "name": "small",
        "model": {
            "encoders": {"text": str(home / "bert"), "image": str(home / "vit"), "audio": str(home / "whisper")},
            "dtype": "float32",
        },
        "adapter": {"targets": ["language.attention"], "lora_rank": 4, "modules_to_save": ["projector", "head"]},
        "data": {
            "train": [
                {
                    "path": str(home / "train.jsonl"),
                    "columns": {"note": "text", "ward": "tag", "y": "label"},
                }
            ],
            "eval": [{"path": str(home / "test.jsonl"), "name": "test"}],
        },
        "objective": {"name": "classification", "hidden_size": 16, "strategy": "gated"},
        "train": {
            "output_dir": str(out),
            "per_device_train_batch_size": 8,
            "num_train_epochs": 3,
            "learning_rate": 3e-3,
            "bf16": False,
            "logging_steps": 1,
        },
        "evaluate": {"per_device_eval_batch_size": 8, "group_by": ["ward"], "bootstrap_samples": 50},
    }
    for section, fields in changes.items():
        given[section] = {**given[section], **fields} if isinstance(fields, dict) else fields
    return given


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Stored features of the tests lie beside them."""
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def done(home, tmp_path_factory):
    """A finished run with LoRA in the text encoder."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFT_CACHE", str(out / "cache"))
        report = mmft.train(recipe(home, out), quiet=True)
    return out / "small", report


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_tells_scores_groups_figures_and_worths(done):
    folder, report = done
    entry = report["sets"]["test"]
    assert set(entry["scores"]) == {"base", "adapter", "merged"}
    assert set(entry["groups"]["ward"]) == {"north", "south"}
    assert {"accuracy", "balanced_accuracy", "macro_f1", "micro_recall", "log_loss", "ece"} <= set(
        entry["scores"]["adapter"]
    )
    for name, value in entry["scores"]["adapter"].items():
        assert entry["scores"]["merged"][name]["value"] == pytest.approx(value["value"], abs=1e-5), name
    assert entry["paired"]["adapter-base"]["metrics"].keys() == entry["scores"]["adapter"].keys()
    worth = entry["worth"]["adapter"]
    assert set(worth["modalities"]) == {"note", "photo", "sound", "table"}
    total = sum(one["shapley"]["value"] for one in worth["modalities"].values())
    assert total == pytest.approx(worth["full"]["value"] - worth["empty"]["value"], abs=1e-9)
    assert worth["full"]["value"] == pytest.approx(entry["scores"]["adapter"]["accuracy"]["value"])
    confusion = np.array(entry["figures"]["adapter"]["confusion"])
    assert confusion.sum() == 24
    assert confusion.trace() / 24 == pytest.approx(entry["scores"]["adapter"]["accuracy"]["value"])
    page = (folder / "report.html").read_text()
    for words in (
        "What each modality is worth",
        "Calibration on test",
        "ROC curves",
        "Confusion of the adapter",
        "ward",
    ):
        assert words in page


def test_the_merged_folder_is_a_fusion_model(done, home):
    folder, report = done
    assert report["merge"]["proof"]["classification"]["max_difference"] < 1e-5
    model = FusionModel.from_pretrained(folder / "merged")
    processor = FusionProcessor.from_pretrained(folder / "merged")
    assert processor.modalities == model.config.modalities == ("note", "photo", "sound", "table")
    found = model.eval()(**processor([{"note": "a red dog"}, {"table": {"age": 3.0}}]))
    assert found.logits.shape == (2, 3)
    # Statistics are those of the training rows that have a value.
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    ages = [row["age"] for row in rows if row["age"] is not None]
    assert model.config.table["numeric"][0]["mean"] == pytest.approx(np.mean(ages))


def test_lora_and_the_fusion_are_trained_and_the_rest_stays(done):
    folder, _ = done
    base, merged = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert any(name.startswith("encoders.note.") for name in changed)
    assert any(name.startswith("strategy.") for name in changed)
    assert any(name.startswith("projections.sound.") for name in changed)
    assert not any(name.startswith(("encoders.photo.", "encoders.sound.")) for name in changed)


def test_resume_goes_on_exactly(done, home, tmp_path):
    folder, _ = done
    part = mmft.train(recipe(home, tmp_path, train={"max_steps": 9, "save_steps": 5}), quiet=True)
    assert part["training"]["steps"] == 9
    whole = load_file(tmp_path / "small" / "adapter" / "adapter_model.safetensors")
    for name in ("adapter", "merged", "report.json", "report.html", "merge_report.json"):
        path = tmp_path / "small" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "small" / "checkpoints" / "step-000009", ignore_errors=True)
    for path in (tmp_path / "small" / "checkpoints").iterdir():
        if "9" in path.name:
            shutil.rmtree(path)
    mmft.train(recipe(home, tmp_path, train={"max_steps": 9, "save_steps": 5}), resume=True, quiet=True)
    again = load_file(tmp_path / "small" / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_stored_features_change_nothing(home, tmp_path):
    runs = {}
    for name, fields in (("with", {}), ("without", {"cache_features": False})):
        given = recipe(home, tmp_path / name, objective=fields, train={"max_steps": 6})
        mmft.train({**given, "export": {"merge": False}}, quiet=True)
        runs[name] = tmp_path / name / "small"
    assert losses(runs["with"]) == pytest.approx(losses(runs["without"]), abs=1e-5)
    one, other = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in runs.values())
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_each_row_is_encoded_once(home, tmp_path, monkeypatch):
    seen: dict[str, int] = {}
    build = FeatureStore.build.__func__

    def counted(cls, path, model, batches, names, **options):
        held = list(batches)
        for name in names:
            seen[name] = sum(int(batch["present"][name].sum()) for batch in held)
        return build(cls, path, model, held, names, **options)

    monkeypatch.setattr(FeatureStore, "build", classmethod(counted))
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        given = recipe(home, tmp_path / name, train={"max_steps": 2, "seed": len(seen)})
        mmft.train({**given, "export": {"merge": False}, "evaluate": {"models": ["adapter"]}}, quiet=True)
    with_sound = sum(
        1 for part in ("train", "test") for line in (home / f"{part}.jsonl").open() if '"sound": null' not in line
    )
    assert seen == {"photo": 72, "sound": with_sound}  # the text encoder has LoRA; the second run found all there


def test_changed_pictures_are_not_stored(home, tmp_path):
    """Sounds still are; the losses are those of a run that stores nothing."""
    runs = {}
    for name, fields in (("with", {}), ("without", {"cache_features": False})):
        given = recipe(home, tmp_path / name, objective=fields, train={"max_steps": 6})
        given["data"] = {**given["data"], "augmentation": {"crop": 0.5, "color": 0.5}}
        mmft.train({**given, "export": {"merge": False}, "evaluate": {"models": ["adapter"]}}, quiet=True)
        runs[name] = losses(tmp_path / name / "small")
    assert runs["with"] == pytest.approx(runs["without"], abs=1e-5)
    plain = recipe(home, tmp_path / "plain", train={"max_steps": 6})
    mmft.train({**plain, "export": {"merge": False}, "evaluate": {"models": ["adapter"]}}, quiet=True)
    assert losses(tmp_path / "plain" / "small") != pytest.approx(runs["with"], abs=1e-5)
    given = recipe(home, tmp_path / "wanted", adapter={"targets": ["projector"]}, objective={"cache_features": True})
    given["adapter"] = {"method": "full", "targets": ["projector", "head"]}
    given["data"] = {**given["data"], "augmentation": {"crop": 0.5}}
    with pytest.raises(RecipeError, match="pictures of 'photo' are changed anew[\\s\\S]*cache_features"):
        mmft.train(given, quiet=True)


def test_features_of_a_trained_encoder_are_refused(home, tmp_path):
    with pytest.raises(RecipeError, match="encoder of 'note' is trained[\\s\\S]*cache_features"):
        mmft.train(recipe(home, tmp_path, objective={"cache_features": True}), quiet=True)


@pytest.mark.parametrize("strategy", ["early", "late_stacking", "hybrid", "cross_attention", "low_rank"])
def test_every_strategy_runs_from_a_recipe(strategy, home, tmp_path):
    given = recipe(
        home,
        tmp_path,
        objective={"strategy": strategy, "modality_dropout": 0.2, "auxiliary_weight": 0.1, "focal_gamma": 1.0},
        train={"max_steps": 2},
        adapter={"method": "full", "targets": ["projector", "head"], "modules_to_save": [], "lora_rank": 16},
    )
    report = mmft.train({**given, "evaluate": {"models": ["base", "adapter"], "bootstrap_samples": 20}}, quiet=True)
    assert 0 <= report["scores"]["adapter"]["accuracy"]["value"] <= 1
    model = FusionModel.from_pretrained(tmp_path / "small" / "model")
    if strategy == "late_stacking":
        late = model.modality_head
        assert not torch.allclose(late.stack_weight, late.average())


@pytest.mark.parametrize(
    ("task", "label"),
    [
        ("ordinal", lambda at: ["low", "mid", "high"][at % 3]),
        ("regression", lambda at: at / 7),
        ("multi_label", lambda at: ["a", "b"][: at % 3]),
    ],
)
def test_the_other_heads_run_from_a_recipe(task, label, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        rows = [{"x": float(rng.normal()), "z": "uvw"[at % 3], "y": label(at)} for at in range(30)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = recipe(tmp_path, tmp_path, train={"max_steps": 4})
    given |= {
        "model": {"encoders": {}, "name_or_path": "composed", "dtype": "float32"},
        # A model without encoders is one part, which has the name of the main one.
        "adapter": {"method": "full", "targets": ["language"]},
        "evaluate": {"models": ["adapter"], "bootstrap_samples": 20},
        "objective": {"name": "classification", "task": task, "hidden_size": 16}
        | ({"classes": ["low", "mid", "high"]} if task == "ordinal" else {}),
    }
    given["data"]["train"][0]["columns"] = {"z": "categorical", "y": "label"}
    scores = mmft.train(given, quiet=True)["scores"]["adapter"]
    wanted = {"ordinal": "quadratic_kappa", "regression": "rmse", "multi_label": "macro_f1"}[task]
    assert math.isfinite(scores[wanted]["value"])


def test_balanced_sampling_makes_classes_equal(home):
    from mmft.data.formats import load_many
    from mmft.data.table_rows import label_of

    loaded = load_recipe(recipe(home, home))
    [train] = load_many(loaded.data.train, loaded.data, 0, wanted=("table",))
    counts: dict[str, int] = {}
    rows = oversampled(train.samples, seed=0)
    for sample in rows:
        counts[label_of(sample)] = counts.get(label_of(sample), 0) + 1
    assert len(set(counts.values())) == 1
    assert {sample.id for sample in rows} == {sample.id for sample in train.samples}
    assert [one.id for one in rows] == [one.id for one in oversampled(train.samples, seed=0)]


def test_each_modality_can_have_its_own_learning_rate(home, tmp_path):
    from mmft.adapters.build import build_adapters
    from mmft.backbones.load import load_backbone
    from mmft.kinds.fusion import Fusion

    loaded = load_recipe(recipe(home, tmp_path))
    backbone = load_backbone(Fusion().base(loaded, tmp_path / "run"))
    adapted = build_adapters(backbone, loaded.adapter, seed=0)
    groups = with_rates(adapted, {"note": 1e-5, "sound": 2e-5}).groups
    rates = {name: group.learning_rate for group in groups for name in group.names}
    assert rates.keys() == adapted.trainable().keys()
    assert {rate for name, rate in rates.items() if ".encoders.note." in name} == {1e-5}
    assert {rate for name, rate in rates.items() if ".projections.modules_to_save.default.sound." in name
            or ".projections.sound." in name} == {2e-5}  # fmt: skip
    assert {rate for name, rate in rates.items() if ".strategy." in name} == {None}
    with pytest.raises(RecipeError, match="no modality is called 'nose'"):
        with_rates(adapted, {"nose": 1.0})
    with pytest.raises(RecipeError, match="no modality is called|nothing of 'table'"):
        with_rates(adapted, {"tabel": 1.0})


@pytest.mark.slow
def test_two_processes_compute_what_one_does(home, tmp_path):
    """The same rows in a step, once as two micro-batches in a row, once on two ranks; modalities are dropped alike."""
    fields = {"max_steps": 4, "effective_batch_size": 16}
    for name in ("one", "two"):
        given = recipe(home, tmp_path / name, objective={"modality_dropout": 0.3}, train=fields)
        given = {**given, "export": {"merge": False}, "evaluate": {"models": ["adapter"], "bootstrap_samples": 20}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(given))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        launch = launch if name == "two" else [sys.executable]
        outcome = run_process(*launch, "-m", "mmft", "train", path, ACCELERATE_USE_CPU="true")
        assert outcome.code == 0, outcome.err[-6000:]
    one, two = (losses(tmp_path / name / "small") for name in ("one", "two"))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)


def broken(home: Path, folder: Path, **cells) -> Path:
    """The training rows with cells of the second row changed."""
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    rows[1] |= cells
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bad_rows_are_named_before_or_in_training(home, tmp_path):
    def run(path: Path, **changes):
        given = recipe(home, tmp_path / "runs", **changes)
        source = {**given["data"]["train"][0], "path": str(path), "media_root": str(home)}
        given["data"] = {**given["data"], "train": [source]}
        return mmft.train({**given, "export": {"merge": False}}, quiet=True, overwrite=True)

    write_wav(home / "media" / "silent.wav", np.zeros(3000, dtype=np.float32))
    (home / "media" / "empty.wav").write_bytes(b"")
    with pytest.raises(DataError, match="silent[\\s\\S]*|sound[\\s\\S]*silent"):
        run(broken(home, tmp_path, sound="media/silent.wav"))
    with pytest.raises(DataError, match="1 of 48 rows[\\s\\S]*empty|column sound"):
        run(broken(home, tmp_path, sound="media/empty.wav"))
    with pytest.raises(DataError, match="'maybe' is not in the declared set[\\s\\S]*none"):
        run(broken(home, tmp_path, y="maybe"), objective={"classes": ["none", "one", "both"]})
    with pytest.raises(DataError, match="never occur in training"):
        run(home / "train.jsonl", objective={"classes": ["none", "one", "both", "all"]})
    with pytest.raises(DataError, match="the label is empty"):
        run(broken(home, tmp_path, y=None))
    with pytest.raises(RecipeError, match="holds audio and no encoder"):
        run(home / "train.jsonl", model={"encoders": {"text": str(home / "bert"), "image": str(home / "vit")}})
    with pytest.raises(RecipeError, match="encoder of 'video' has no column"):
        encoders = {kind: str(home / name) for kind, name in (("text", "bert"), ("image", "vit"), ("audio", "whisper"))}
        run(home / "train.jsonl", model={"encoders": {**encoders, "video": str(home / "vit")}})


def test_documented_behaviour_is_no_crash(home, tmp_path):
    """A NaN in the table is a missing number, a text-only row among image rows lacks the others, a batch may lack a
    modality everywhere."""
    rows = [json.loads(line) for line in (home / "train.jsonl").read_text().splitlines()]
    for at, row in enumerate(rows):
        if at != 7:  # one sound in all rows: most batches have none
            row["sound"] = None
        if at % 2:
            row |= {"photo": None, "age": float("nan")}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = recipe(home, tmp_path / "runs", train={"max_steps": 6})
    given["data"]["train"] = [{**given["data"]["train"][0], "path": str(path), "media_root": str(home)}]
    report = mmft.train(
        {**given, "export": {"merge": False}, "evaluate": {"models": ["adapter"], "bootstrap_samples": 20}}, quiet=True
    )
    assert all(map(math.isfinite, losses(tmp_path / "runs" / "small")))
    assert report["complete"]


def test_an_unknown_label_of_an_evaluation_row_stops_before_the_first_step(home, tmp_path):
    rows = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    rows[3]["y"] = "tow"
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = recipe(home, tmp_path / "runs")
    given["data"]["eval"] = [{"path": str(path), "media_root": str(home)}]
    with pytest.raises(DataError, match="'tow' is not in the declared set"):
        mmft.train(given, quiet=True)
    assert not (tmp_path / "runs" / "small" / "metrics.jsonl").exists()
