"""Whole runs whose base is unusual for a merge: stacked experts, and weights that are stored quantized."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, MixtralConfig

import mmft
from mmft.export.formats import copy_model
from mmft.files import verify_folder
from tests.runs import model, read_lines, write_recipe

torch.set_num_threads(1)
STEPS = {"train.max_steps": 12, "train.save_steps": 12, "evaluate.max_new_tokens": 2}


def _load(folder: Path, **options: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()


def _by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    return dict(PeftModel.from_pretrained(_load(base), str(adapter)).merge_and_unload().state_dict())


def _save_mixtral_llava(folder: Path) -> Path:
    """The tiny llava with a Mixtral of four experts as its language model."""
    shutil.copytree(model(), folder)
    config = AutoConfig.from_pretrained(folder)
    sizes = config.text_config.to_dict()
    kept = {name: sizes[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    tokens = {name: sizes[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config.text_config = MixtralConfig(
        **kept, **tokens, intermediate_size=64, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    built = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    built.save_pretrained(folder)
    return folder


def test_experts_are_trained_and_merged_by_a_recipe(tmp_path: Path) -> None:
    """LoRA on three-dimensional weights; merge, proof and evaluation, the weights bit for bit those of peft."""
    base = _save_mixtral_llava(tmp_path / "base")
    changes = {
        "model.name_or_path": str(base),
        "adapter.targets": ["language.mlp", "language.attention"],
        "adapter.lora_rank": 4,
        "adapter.lora_dropout": 0.0,
    }
    report = mmft.train(write_recipe(tmp_path, {**STEPS, **changes}), quiet=True)
    run = tmp_path / "runs" / "tiny"
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4
    want, got, before = _by_peft(base, run / "adapter"), _load(run / "merged").state_dict(), _load(base).state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    moved = {name for name in want if not torch.equal(want[name], before[name])}
    assert len([name for name in moved if ".experts." in name]) == 4
    assert report["merge"]["proof"]["outputs"]["checked"]
    verify_folder(run / "merged")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llava as bitsandbytes stores it in 4 bits, with its processor."""
    folder = tmp_path_factory.mktemp("stored") / "base"
    shutil.copytree(model(), folder)
    section = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )
    quantized = _load(folder, quantization_config=section)
    (folder / "model.safetensors").unlink()
    quantized.save_pretrained(folder)
    return folder


def test_a_run_from_a_stored_quantized_checkpoint(stored: Path, tmp_path: Path) -> None:
    """Train, merge, verify, evaluate: what is merged is bitsandbytes' own weights plus the adapter."""
    assert any("quant_state" in name for name in load_file(stored / "model.safetensors"))
    changes = {"model.name_or_path": str(stored), "adapter.targets": ["language.attention", "projector"]}
    report = mmft.train(write_recipe(tmp_path, {**STEPS, **changes}), quiet=True)
    run = tmp_path / "runs" / "tiny"
    assert report["merge"]["proof"]["outputs"]["checked"]
    config = json.loads((run / "merged/config.json").read_text())
    assert "quantization_config" not in config
    plain = _load(stored).dequantize()
    plain.save_pretrained(tmp_path / "plain")
    want, got = _by_peft(tmp_path / "plain", run / "adapter"), _load(run / "merged").state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    verify_folder(run / "merged")
    copy_model(stored, tmp_path / "copied")
    found = mmft.verify(str(tmp_path / "copied"), run / "adapter", run / "merged")
    factors = load_file(run / "adapter/adapter_model.safetensors")
    assert found["proof"]["touched"] == len(factors) // 2 and found["proof"]["worst"] <= 1.001
    rows = read_lines(run / "predictions.jsonl")
    assert len(rows) == 8 and all(row["answers"].keys() == {"base", "adapter", "merged"} for row in rows)
    assert all(row["answers"]["adapter"] == row["answers"]["merged"] for row in rows)
    assert {which: scores["exact_match"]["n"] for which, scores in report["scores"].items()} == dict.fromkeys(
        ("base", "adapter", "merged"), 8
    )
