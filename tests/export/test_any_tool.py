"""`verify` on merges that peft made and save_pretrained wrote, right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mmft.errors import ExportError
from mmft.export.verify import verify_merge
from tests.export import zoo

torch.set_num_threads(1)


def merged_by_peft(base: Path, adapter: Path, out: Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    model = PeftModel.from_pretrained(zoo.load(base, dtype), str(adapter)).merge_and_unload()
    model.save_pretrained(out, **options)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = zoo.save_tiny(folder / "base", "llava")
    return base, zoo.adapt(base, folder / "adapter", target_modules=["q_proj", "v_proj", "down_proj", "fc1"])


@pytest.mark.parametrize("shard", ["30KB", "5GB"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["same", "bf16", "fp16"])
def test_right_ones(dtype: torch.dtype | None, shard: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    merged_by_peft(base, adapter, tmp_path / "merged", dtype, max_shard_size=shard)
    report = verify_merge(base, adapter, tmp_path / "merged")
    assert report.touched == 3 * 2 + 3 * 2 and report.bound.startswith("one rounding each") and report.worst <= 1


def test_right_one_written_wider(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=torch.bfloat16)
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=["q_proj", "fc1"])
    merged_by_peft(base, adapter, tmp_path / "merged", torch.float32)
    assert verify_merge(base, adapter, tmp_path / "merged").touched == 6


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama", "smolvlm"])
def test_right_ones_with_ties_undone(kind: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", kind, tie=True)
    adapter = zoo.adapt(base, tmp_path / "adapter")
    model = PeftModel.from_pretrained(zoo.load(base), str(adapter)).merge_and_unload()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "merged")
    verify_merge(base, adapter, tmp_path / "merged")


def test_names_of_an_older_layout(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The merged folder may call its tensors as another transformers version does."""
    from safetensors.torch import load_file, save_file

    base, adapter = pair
    merged_by_peft(base, adapter, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged/model.safetensors")
    old = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    verify_merge(base, adapter, tmp_path / "merged")


Break = Callable[[Any, Any], None]


def _forget(part: str) -> Break:
    def change(model: Any, base: Any) -> None:
        before = base.state_dict()
        for name, value in model.state_dict().items():
            if part in name:
                value.copy_(before[name])

    return change


def _add(name: str, times: float) -> Break:
    def change(model: Any, base: Any) -> None:
        value = model.state_dict()[name]
        value.add_((value - base.state_dict()[name]) * times)

    return change


def _nudge(name: str, amount: float) -> Break:
    def change(model: Any, _: Any) -> None:
        model.state_dict()[name].view(-1)[7] += amount

    return change


Q = "model.language_model.layers.1.self_attn.q_proj.weight"
NORM = "model.vision_tower.encoder.layers.0.layer_norm1.weight"
WRONG: dict[str, tuple[Break, str, str]] = {
    "one value of a merged tensor": (_nudge(Q, 1e-4), r"layers\.1\.self_attn\.q_proj\.weight is not W", "off by up to"),
    "one value of another": (_nudge(NORM, 1e-5), r"layer_norm1\.weight was not touched", "bytes differ"),
    "one lora forgotten": (_forget(Q), r"layers\.1\.self_attn\.q_proj\.weight is not W", "the adapter is not in it"),
    "one lora twice": (_add(Q, 1.0), r"layers\.1\.self_attn\.q_proj\.weight is not W", "in it twice"),
    "wrong scaling": (_add(Q, 0.5), r"layers\.1\.self_attn\.q_proj\.weight is not W", "1.5 times"),
    "tower forgotten": (
        _forget("vision_tower"),
        r"6 tensors \(all that the adapter changes in vision_tower",
        "not in it",
    ),
    "everything forgotten": (_forget(""), r"12 tensors \(all that the adapter changes\)", "the adapter is not in it"),
}


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_ones_are_named(wrong: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    change, where, what = WRONG[wrong]
    model = PeftModel.from_pretrained(zoo.load(base), str(adapter)).merge_and_unload()
    change(model, zoo.load(base))
    model.save_pretrained(tmp_path / "merged")
    with pytest.raises(ExportError, match=where) as caught:
        verify_merge(base, adapter, tmp_path / "merged")
    assert what in str(caught.value)
    assert caught.value.exit_code != 0


@torch.no_grad()
def test_a_faint_adapter_that_is_not_there(tmp_path: Path) -> None:
    """Each value is within bfloat16's rounding of the right one, all together are not."""
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256)
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=["down_proj"], lora_alpha=0.02)
    model = zoo.load(base)
    model.save_pretrained(tmp_path / "merged")
    want = zoo.merged_by_peft(base, adapter)
    assert any(not torch.equal(value, want[name]) for name, value in model.state_dict().items())
    with pytest.raises(ExportError, match="the adapter is not in it"):
        verify_merge(base, adapter, tmp_path / "merged")


@torch.no_grad()
def test_missing_and_foreign_tensors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = pair
    merged_by_peft(base, adapter, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged/model.safetensors")
    key = next(key for key in tensors if key.endswith("linear_1.weight"))
    del tensors[key]
    save_file(tensors, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="is missing in the merged folder") as caught:
        verify_merge(base, adapter, tmp_path / "merged")
    assert "multi_modal_projector.linear_1.weight" in str(caught.value)


def test_another_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    zoo.save_tiny(tmp_path / "merged", "llava", hidden_size=64)
    with pytest.raises(ExportError, match=r"\[160, 64\], not torch.float32\[160, 32\]|each is"):
        verify_merge(base, adapter, tmp_path / "merged")
