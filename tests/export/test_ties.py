"""One switch for all ties of a model; folders of trained weights; folders whose class is not the auto class's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration

from mmft.errors import ExportError
from mmft.export import merge as merging
from mmft.export.merge import merge_adapter
from mmft.export.names import model_class
from mmft.export.verify import verify_merge
from tests.export import zoo

torch.set_num_threads(1)


def bart(folder: Path) -> Path:
    """Four names for one table: shared, the encoder's, the decoder's, the head's."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "vocab_size": 96, "max_position_embeddings": 64}
    ends = {f"{end}_{name}": 2 for end in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(**sizes, **ends, encoder_ffn_dim=48, decoder_ffn_dim=48, tie_word_embeddings=True)
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path) -> torch.nn.Module:
    model = BartForConditionalGeneration.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["model.decoder.embed_tokens"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) * 0.1)
    tuned.save_pretrained(folder)
    return tuned.eval()


def test_all_that_the_switch_unties_is_written(tmp_path: Path) -> None:
    base = bart(tmp_path / "base")
    tuned = adapt(base, tmp_path / "adapter")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    ends = {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"}
    assert set(report.untied) == ends
    merged, info = BartForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    table = BartForConditionalGeneration.from_pretrained(base).state_dict()["model.shared.weight"]
    got = merged.state_dict()
    assert torch.equal(got["lm_head.weight"], table) and torch.equal(got["model.encoder.embed_tokens.weight"], table)
    assert not torch.equal(got["model.decoder.embed_tokens.weight"], table)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        want, have = (model.eval()(input_ids=ids, decoder_input_ids=ids).logits for model in (tuned, merged))
    assert (want - have).abs().max() < 1e-5  # W x + B A x in another order than (W + B A) x
    assert verify_merge(base, tmp_path / "adapter", tmp_path / "merged").touched == 1


def test_what_stays_tied_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bart(tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    tie = {"model.decoder.embed_tokens.weight": "model.shared.weight"}
    monkeypatch.setattr(merging, "left_ties", lambda *_: tie)
    with pytest.raises(ExportError, match="decoder.embed_tokens.weight cannot be untied in this model"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_trained_weights_replace_the_bases(dtype: torch.dtype, tmp_path: Path) -> None:
    """What the methods `bitfit` and `full` save: new values by the names in memory, no adapter config."""
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=dtype)
    state = zoo.load(base).state_dict()
    trained = {name: value.float() + 0.01 for name, value in state.items() if name.endswith("fc1.bias")}
    assert len(trained) == 2
    (tmp_path / "adapter").mkdir()
    save_file(trained, tmp_path / "adapter/trained_weights.safetensors")
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert {change.name for change in report.changes} == set(trained)
    got = zoo.load(tmp_path / "merged").state_dict()
    for name, value in state.items():
        assert torch.equal(got[name], trained[name].to(dtype) if name in trained else value)
    proof = verify_merge(base, tmp_path / "adapter", tmp_path / "merged", rows=zoo.text_rows(zoo.load(base)))
    assert proof.touched == 2 and proof.worst <= 1
    tensors = load_file(tmp_path / "merged/model.safetensors")
    key = next(key for key in tensors if key.endswith("fc1.bias"))
    tensors[key] = tensors[key] - 0.01
    save_file(tensors, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    for name in ("MANIFEST.json", "merge_report.json"):
        (tmp_path / "merged" / name).unlink()
    with pytest.raises(ExportError, match="is not what the adapter holds") as caught:
        verify_merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert key in str(caught.value)


def test_trained_weights_without_a_home(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    (tmp_path / "adapter").mkdir()
    save_file({"model.nowhere.bias": torch.zeros(3)}, tmp_path / "adapter/trained_weights.safetensors")
    with pytest.raises(ExportError, match=r"1 of 1 adapter tensors have no home in the base: model\.nowhere\.bias"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")


def test_the_class_is_the_one_that_training_loads(tmp_path: Path) -> None:
    """ShieldGemma2 has Gemma 3's tensors under names of its own; the auto class would not find them."""
    values = {"model_type": "shieldgemma2", "architectures": ["ShieldGemma2ForImageClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert model_class(tmp_path).__name__ == "ShieldGemma2ForImageClassification"
