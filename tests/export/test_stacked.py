"""Experts, stacked in memory and apart on disk or stacked in both, as bare parameters or one by one; grown tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mmft.errors import ExportError
from mmft.export import shards
from mmft.export.merge import merge_adapter
from mmft.export.names import map_names, meta_model
from mmft.export.verify import verify_merge
from tests.export import zoo
from tests.export.test_methods import adapt, assert_same

torch.set_num_threads(1)
SIZES = {**zoo.TEXT, "num_key_value_heads": 4, "head_dim": 8}
EXPERTS: dict[str, dict[str, Any]] = {
    "MixtralConfig": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeConfig": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
    },
    "GptOssConfig": {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
}


def save_experts(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SIZES, **EXPERTS[kind]})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    return dict(PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_bare_parameters(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Both parameters of a module, whose wrappers nest, and one rank for each."""
    base = save_experts(tmp_path / "base", kind, dtype)
    apart = any(".experts.0." in key for key in load_file(base / "model.safetensors"))
    assert apart == (kind != "GptOssConfig")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, rank_pattern={"down_proj": 2})
    adapter = adapt(base, tmp_path / "adapter", config, model=load(base))
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same(by_peft(base, adapter), load(tmp_path / "merged").state_dict())
    disk = load_file(base / "model.safetensors")
    assert {k: v.shape for k, v in disk.items()} == {
        k: v.shape for k, v in load_file(tmp_path / "merged/model.safetensors").items()
    }
    verify_merge(base, adapter, tmp_path / "merged")


def test_experts_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No group is held whole: rows go through one checkpoint tensor at a time, in small blocks."""
    base = save_experts(tmp_path / "base", "Qwen3MoeConfig")
    config = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapter = adapt(base, tmp_path / "adapter", config, model=load(base))
    monkeypatch.setattr("mmft.export.produce.Producer._group", lambda *_: pytest.fail("a whole group was converted"))
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 64)
    report = merge_adapter(base, adapter, tmp_path / "merged", max_shard_size="10KB")
    assert_same(by_peft(base, adapter), load(tmp_path / "merged").state_dict())
    before, after = load(base).state_dict(), load(tmp_path / "merged").state_dict()
    for change in report.changes:
        want = (after[change.name] - before[change.name]).norm()
        assert change.delta_norm == pytest.approx(float(want), rel=1e-4)


def test_row_numbers_follow_the_loader(tmp_path: Path) -> None:
    base = save_experts(tmp_path / "base", "MixtralConfig")
    weights = shards.Weights([base / "model.safetensors"])
    names = map_names(meta_model(base), weights.entries)
    runtime = load(base).state_dict()
    assert names.groups
    for group in names.groups:
        for segment in names.segments(group) or pytest.fail(f"{group.first} is not followed"):
            rows = weights.matrix(segment.key, segment.row, segment.row + segment.count, stacked=True)
            whole = runtime[segment.target].flatten(0, -2)
            assert torch.equal(rows, whole[segment.target_row : segment.target_row + segment.count])


def test_experts_adapted_one_by_one(tmp_path: Path) -> None:
    """An adapter of transformers 4, where each expert was a module: it goes to the checkpoint's own tensors."""
    base = save_experts(tmp_path / "base", "MixtralConfig")
    disk = load_file(base / "model.safetensors")
    factors, torch_seed = {}, torch.Generator().manual_seed(1)
    for key, value in disk.items():
        if ".experts." in key:
            stem = "base_model.model." + key.removesuffix(".weight")
            factors[f"{stem}.lora_A.weight"] = torch.randn(4, value.shape[1], generator=torch_seed)
            factors[f"{stem}.lora_B.weight"] = torch.randn(value.shape[0], 4, generator=torch_seed) * 0.1
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(values))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    got = load_file(tmp_path / "merged/model.safetensors")
    for key, value in disk.items():
        stem = "base_model.model." + key.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in factors:
            value = value + factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"] * 0.5
        assert torch.equal(got[key], value), key
    verify_merge(base, tmp_path / "adapter", tmp_path / "merged")
    key = next(key for key in got if key.endswith("experts.2.w3.weight"))
    got[key] = disk[key]
    save_file(got, tmp_path / "merged/model.safetensors")
    (tmp_path / "merged/MANIFEST.json").unlink()
    with pytest.raises(ExportError, match=r"is not W \+ s"):
        verify_merge(base, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("tie", [False, True])
def test_a_vocabulary_that_grew(tie: bool, tmp_path: Path) -> None:
    """The adapter brings whole tables with new rows, and a LoRA on the table; config.json follows."""
    base = zoo.save_tiny(tmp_path / "base", "llava", tie=tie)
    model = zoo.load(base)
    model.resize_token_embeddings(168)
    targets = ["q_proj"] if tie else ["q_proj", "embed_tokens", "lm_head"]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    zoo.randomize(tuned, 1)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["text_config"]["vocab_size"] == 168 and report.untied == ()
    want, got = tuned.merge_and_unload().state_dict(), zoo.load(tmp_path / "merged").state_dict()
    assert_same(dict(want), got)
    verify_merge(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_grown_table_without_its_head_is_refused(tmp_path: Path) -> None:
    """peft does not save the resized head when only the table is a LoRA target."""
    base = zoo.save_tiny(tmp_path / "base", "llava")
    model = zoo.load(base)
    model.resize_token_embeddings(168)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens"]))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ExportError, match="168 rows") as caught:
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert "lm_head.weight" in str(caught.value)
