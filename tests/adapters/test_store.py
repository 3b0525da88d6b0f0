"""An adapter folder loads in plain peft with equal logits, and is refused on a wrong base or when damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmft.adapters.build import Adapted, build_adapters
from mmft.adapters.store import CONFIG, SIDECAR, WEIGHTS, adapter_digest, load_adapter, save_adapter
from mmft.backbones.fingerprint import digest, fingerprint
from mmft.backbones.load import Backbone, load_backbone
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection, ModelSection
from tests.tiny import save_tiny_vlm, tiny_inputs

VALUES = {
    "targets": ["language.attention", "vision"],
    "lora_rank": 4,
    "parts": {"vision": {"lora_rank": 2, "lora_alpha": 5.0}, "projector": {"mode": "full"}},
}
PLAIN = """
import sys, torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
base = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[3])).logits}, sys.argv[4])
assert not [name for name in sys.modules if name.partition(".")[0] == "mmft"]
"""


def load(folder: Path) -> Backbone:
    return load_backbone(ModelSection(name_or_path=str(folder), dtype="float32"))


def trained(folder: Path, values: dict[str, Any] = VALUES) -> Adapted:
    adapted = build_adapters(load(folder), AdapterSection.model_validate(values), seed=0)
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in adapted.trainable().values():
            value.add_(0.1 * torch.randn(value.shape, generator=source))
    adapted.model.eval()
    return adapted


def save(adapted: Adapted, base: Path, folder: Path) -> Path:
    prints = fingerprint(base)
    save_adapter(adapted, folder, base_name=str(base), base_fingerprint=prints, recipe_digest="r")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("base"), "llava")


@pytest.fixture
def stored(base: Path, tmp_path: Path) -> Path:
    return save(trained(base), base, tmp_path / "adapter")


def test_plain_peft_in_a_fresh_process_gives_equal_logits(base: Path, tmp_path: Path) -> None:
    adapted = trained(base)
    folder = save(adapted, base, tmp_path / "adapter")
    inputs = tiny_inputs("llava", batch=2)
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "inputs")
    command = [sys.executable, "-c", PLAIN, str(base), str(folder), str(tmp_path / "inputs"), str(tmp_path / "out")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=tmp_path, env=env, capture_output=True)
    with torch.no_grad():
        logits = adapted.model(**inputs).logits
        untrained = load(base).model(**inputs).logits
        ours = load_adapter(load(base), folder)(**inputs).logits
    assert torch.equal(ours, logits)
    assert torch.allclose(load_file(tmp_path / "out")["logits"], logits, atol=1e-5)
    assert (logits - untrained).abs().max() > 0.1


def test_the_folder_is_an_ordinary_one(base: Path, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        folder = save(trained(base), base, tmp_path / "a")
        again = save(trained(base), base, tmp_path / "b")
    finally:
        os.umask(mask)
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        CONFIG: 0o644,
        WEIGHTS: 0o644,
        SIDECAR: 0o644,
    }
    config = json.loads((folder / CONFIG).read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert len(config["target_modules"]) == 8 + 12 and all("." in name for name in config["target_modules"])
    sidecar = json.loads((folder / SIDECAR).read_text())
    assert sidecar["base_digest"] == digest(fingerprint(base)) and sidecar["recipe_digest"] == "r"
    assert adapter_digest(folder) == adapter_digest(again)
    other = load_file(folder / WEIGHTS)
    next(iter(other.values()))[0] += 1
    save_file(other, folder / WEIGHTS)
    assert adapter_digest(folder) != adapter_digest(again)


def test_another_base_is_refused_with_both_digests(stored: Path, base: Path, tmp_path: Path) -> None:
    other = save_tiny_vlm(tmp_path / "other", "llava", seed=1)
    with pytest.raises(AdapterError, match="was trained on another base") as caught:
        load_adapter(load(other), stored)
    text = str(caught.value)
    assert digest(fingerprint(base)) in text and digest(fingerprint(other)) in text
    assert "model.safetensors differ" in text


def test_missing_unexpected_and_bad_tensors(stored: Path, base: Path) -> None:
    tensors = load_file(stored / WEIGHTS)
    names = sorted(tensors)

    def refused(changed: dict[str, torch.Tensor], match: str) -> str:
        save_file(changed, stored / WEIGHTS)
        with pytest.raises(AdapterError, match=match) as caught:
            load_adapter(load(base), stored)
        return str(caught.value)

    text = refused({name: tensors[name] for name in names[7:]}, "7 tensors are missing")
    assert ", ".join(names[:5]) in text and names[5] not in text
    assert "stray" in refused({**tensors, "stray": torch.zeros(1)}, "1 tensors are unexpected")
    refused({**tensors, names[0]: tensors[names[0]] * float("nan")}, "NaN or infinity")
    refused({**tensors, names[0]: torch.zeros(3, 3)}, "does not fit this base")
    (stored / WEIGHTS).write_bytes(b"junk" * 10)
    with pytest.raises(AdapterError, match="is damaged"):
        load_adapter(load(base), stored)
    (stored / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(load(base), stored)
    (stored / SIDECAR).write_text("{}")
    with pytest.raises(AdapterError, match="has no base_fingerprint"):
        load_adapter(load(base), stored)
    (stored / SIDECAR).unlink()
    (stored / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        load_adapter(load(base), stored)


def test_a_plain_peft_folder_loads_without_a_fingerprint(stored: Path, base: Path) -> None:
    (stored / SIDECAR).unlink()
    load_adapter(load(base), stored)


def test_a_diverged_adapter_is_not_written(base: Path, tmp_path: Path) -> None:
    adapted = trained(base)
    next(iter(adapted.trainable().values())).data[0] = float("inf")
    with pytest.raises(AdapterError, match="1 tensors hold NaN or infinity"):
        save(adapted, base, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / WEIGHTS).exists()


def test_full_training_is_stored_and_loaded(base: Path, tmp_path: Path) -> None:
    adapted = trained(base, {"method": "full", "targets": ["projector"]})
    folder = save(adapted, base, tmp_path / "adapter")
    inputs = tiny_inputs("llava")
    with torch.no_grad():
        assert torch.equal(load_adapter(load(base), folder)(**inputs).logits, adapted.model(**inputs).logits)
    assert adapter_digest(folder)
