"""LoRA on nn.MultiheadAttention: recipes leave it alone, and a folder of plain peft's is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from mmft.backbones.parts import find_parts
from mmft.errors import ExportError
from mmft.export.merge import merge_adapter
from tests.export import zoo

torch.set_num_threads(1)
HEAD = "vision_model.head.attention"


def _save(folder: Path) -> Path:
    """SigLIP pools by an nn.MultiheadAttention over the patches."""
    torch.manual_seed(0)
    text = {**zoo.CLIP, "vocab_size": 64, "max_position_embeddings": 16}
    config = transformers.SiglipConfig(text_config=text, vision_config=zoo.CLIP)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def _load(folder: Path) -> nn.Module:
    return transformers.AutoModel.from_pretrained(folder, dtype="auto").eval()


def _adapter(base: Path, folder: Path, targets: list[str]) -> Path:
    tuned = get_peft_model(_load(base), LoraConfig(r=4, target_modules=targets))
    zoo.randomize(tuned, 1)
    tuned.save_pretrained(folder)
    return folder


def test_no_target_reaches_inside(tmp_path: Path) -> None:
    model = _load(_save(tmp_path / "base"))
    parts = find_parts(model)
    assert isinstance(model.get_submodule(HEAD), nn.MultiheadAttention)
    assert parts.linears("vision") and not [name for name in parts.linears("vision") if name.startswith(HEAD)]


def test_an_adapter_on_it_is_refused(tmp_path: Path) -> None:
    base = _save(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter", [HEAD, "q_proj"])
    with pytest.raises(ExportError, match=rf"LoRA on {HEAD}.*the change of its output projection counts twice"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_peft_still_counts_it_twice(tmp_path: Path) -> None:
    """The reason of the refusal; once this fails, W + s·BA is the right merge and may come back."""
    base = _save(tmp_path / "base")
    adapter = _adapter(base, tmp_path / "adapter", [HEAD])
    model = PeftModel.from_pretrained(_load(base), str(adapter))
    name = f"{HEAD}.out_proj.weight"
    layer = model.base_model.model.get_submodule(HEAD).base_layer.out_proj
    delta = layer.get_delta_weight("default").detach()
    change = model.merge_and_unload().state_dict()[name] - _load(base).state_dict()[name]
    assert torch.allclose(change, 2 * delta, atol=1e-6) and not torch.allclose(change, delta, atol=1e-3)
