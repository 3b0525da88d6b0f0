"""The proof: it holds for a good merge, names what is wrong with a bad one, and measures quantized bases."""

from __future__ import annotations

import json
import re
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from mmft.errors import ExportError
from mmft.export.merge import merge_adapter
from mmft.export.roundtrip import RoundTrip
from mmft.export.shards import Entry, row_blocks
from mmft.export.verify import verify_merge
from mmft.files import write_manifest
from mmft.recipe.schema import QuantizationSection
from tests.export import zoo

torch.set_num_threads(1)
MODULES = ["q_proj", "down_proj", "fc1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}],
)
def test_good_merge(dtype: torch.dtype, options: dict, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=dtype)
    adapter = zoo.adapt(base, tmp_path / "adapter", **{"target_modules": MODULES, **options})
    done = merge_adapter(base, adapter, tmp_path / "merged")
    report = verify_merge(base, adapter, tmp_path / "merged", rows=zoo.text_rows(zoo.load(base)))
    assert (report.untouched, report.touched) == (done.untouched, len(done.changes))
    assert report.outputs is not None and report.outputs.positions == 36 and report.outputs.checked
    assert report.outputs.relative <= (1e-5 if dtype is torch.float32 else 2e-2)
    assert report.worst <= 1.001 and (options or report.worst > 0)
    json.dumps(report.to_json())


def test_images_through_an_adapted_tower(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    model = zoo.load(base)
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=zoo.linears(model, every=1))
    merge_adapter(base, adapter, tmp_path / "merged")
    row = zoo.text_rows(model, count=1, length=16)[0]
    row["input_ids"][:, 2:6] = 150  # (28 / 14)^2 patches
    row["pixel_values"] = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    trained = PeftModel.from_pretrained(model, str(adapter))
    report = verify_merge(base, adapter, tmp_path / "merged", rows=[row], adapter_model=trained)
    assert report.outputs is not None and report.outputs.argmax == 1.0 and report.outputs.relative < 1e-5
    with torch.no_grad():
        tower_alone = model.eval()(**{**row, "pixel_values": row["pixel_values"] * 0}).logits
        assert (tower_alone - trained(**row).logits).abs().max() > 100 * report.outputs.max_difference


@pytest.mark.parametrize(
    "on_disk, in_training, written",
    [
        (torch.float32, torch.bfloat16, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float32, "bfloat16"),
    ],
    ids=["trained-in-bf16", "trained-in-fp32", "written-in-bf16"],
)
def test_types_may_differ(on_disk: torch.dtype, in_training: torch.dtype, written: str | None, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=on_disk)
    adapter = zoo.adapt(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged", dtype=written)
    trained = PeftModel.from_pretrained(zoo.load(base, in_training), str(adapter))
    rows = zoo.text_rows(zoo.load(base))
    report = verify_merge(base, adapter, tmp_path / "merged", rows=rows, adapter_model=trained)
    assert report.outputs is not None and 1e-5 < report.outputs.relative < 2e-2
    assert report.outputs.dtype == str(in_training).removeprefix("torch.")


def test_labels_choose_the_positions(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = zoo.adapt(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    row = zoo.text_rows(zoo.load(base), count=1)[0]
    row["labels"] = torch.full_like(row["input_ids"], -100)
    row["labels"][:, -4:] = row["input_ids"][:, -4:]
    report = verify_merge(base, adapter, tmp_path / "merged", rows=[row])
    assert report.outputs is not None and report.outputs.positions == 4


@pytest.mark.parametrize(
    "name, amount, text",
    [
        ("norm.weight", 1e-3, "not touched by the adapter, but its bytes differ"),
        ("q_proj.weight", 1e-3, "is not W"),
        ("q_proj.weight", 1e-6, "is not W"),
    ],
)
def test_one_wrong_value_is_found(name: str, amount: float, text: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=MODULES)
    merge_adapter(base, adapter, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged/model.safetensors")
    key = next(key for key in tensors if key.startswith("language_model") and key.endswith(name))
    tensors[key].view(-1)[5] += amount
    save_file(tensors, tmp_path / "merged/model.safetensors")
    with pytest.raises(ExportError, match="the merged folder is damaged"):
        verify_merge(base, adapter, tmp_path / "merged")
    write_manifest(tmp_path / "merged")
    with pytest.raises(ExportError, match=text) as caught:
        verify_merge(base, adapter, tmp_path / "merged")
    assert key in str(caught.value)


def test_another_adapter_model_is_found(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = zoo.adapt(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    with pytest.raises(ExportError, match="outputs differ"):
        verify_merge(
            base, adapter, tmp_path / "merged", rows=zoo.text_rows(zoo.load(base)), adapter_model=zoo.load(base)
        )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [128, 96, 33])
def test_round_trip_in_blocks_equals_bitsandbytes(width: int, dtype: torch.dtype, kind: str, double: bool) -> None:
    weight = torch.randn(300, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    section = QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)  # type: ignore[arg-type]
    blocks = list(row_blocks(Entry("w", Path(), dtype, (300, width), 0, 0), 64 * width))
    assert len(blocks) == 4
    trip = RoundTrip(lambda start, stop: weight[start:stop].clone(), blocks, section)
    got = torch.cat([trip.rows(start, stop) for start, stop in blocks])
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % 64)).view(-1, 64)
    packed, state = bnb.functional.quantize_4bit(flat, compress_statistics=double, quant_type=kind)
    want = bnb.functional.dequantize_4bit(packed, state).reshape(-1)[: weight.numel()].view_as(weight)
    assert torch.equal(got, want)
    assert 0.05 < (got - weight).float().norm() / weight.float().norm() < 0.15
    if width % 64 == 0:
        packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=double, quant_type=kind)
        assert torch.equal(got, bnb.functional.dequantize_4bit(packed, state))


def test_round_trip_8_bit() -> None:
    weight = torch.randn(130, 48, generator=torch.Generator().manual_seed(0))
    trip = RoundTrip(
        lambda start, stop: weight[start:stop].clone(), [(0, 64), (64, 130)], QuantizationSection(load_in_8bit=True)
    )
    got = torch.cat([trip.rows(0, 64), trip.rows(64, 130)])
    scale = weight.half().float().abs().amax(1, keepdim=True) / 127
    steps = (got - (weight.half().float() / scale).round() * scale).abs() / scale
    assert steps.max() < 1.001 and (steps > 0.001).sum() <= 2  # a tie may round the other way


def test_quantized_base(tmp_path: Path) -> None:
    """QLoRA: the dequantized merge gives the trained model's outputs, the merge onto the base is measured."""
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=torch.bfloat16, hidden_size=128, intermediate_size=192)
    section = QuantizationSection(load_in_4bit=True)
    plain = zoo.load(base)
    kept = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" not in n]
    model = type(plain).from_pretrained(
        base,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=section.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=section.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=[f"{re.escape(name)}$" for name in kept],
        ),
    )
    quantized = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    for name in quantized:
        model.get_submodule(name).support_avx512bf16_for_cpu = False
    assert len(quantized) == 14
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=MODULES)
    trained = PeftModel.from_pretrained(model, str(adapter)).eval()
    options = {"quantization": section, "quantized_modules": quantized}
    on_base = merge_adapter(base, adapter, tmp_path / "on_base", onto="base", **options)  # type: ignore[arg-type]
    on_seen = merge_adapter(base, adapter, tmp_path / "on_seen", onto="dequantized", **options)  # type: ignore[arg-type]
    assert on_base.quantization_error is not None and 0.01 < on_base.quantization_error < 0.2
    assert on_base.quantization_error == on_seen.quantization_error
    assert on_seen.untouched == on_base.untouched - 10  # 14 quantized, 4 of them with an adapter
    rows = zoo.text_rows(zoo.load(base))
    with pytest.raises(ExportError, match="give the trained model"):
        verify_merge(base, adapter, tmp_path / "on_seen", rows=rows)
    report = verify_merge(base, adapter, tmp_path / "on_seen", rows=rows, adapter_model=trained)
    assert report.outputs is not None and report.outputs_other_base is not None
    assert report.outputs.checked and not report.outputs_other_base.checked
    assert report.outputs.relative < 0.02 < 2 * report.outputs_other_base.relative
    assert report.outputs.max_difference < report.outputs_other_base.max_difference / 2
    other = verify_merge(base, adapter, tmp_path / "on_base", rows=rows, adapter_model=trained)
    assert other.outputs is not None and other.outputs_other_base is not None and not other.outputs.checked
    assert other.outputs.max_difference == report.outputs_other_base.max_difference
    want = {n: model.get_submodule(n).weight for n in quantized}
    got = zoo.load(tmp_path / "on_seen").state_dict()
    name = next(name for name in quantized if name.endswith("k_proj"))
    seen = bnb.functional.dequantize_4bit(want[name].data, want[name].quant_state)
    assert torch.equal(got[f"{name}.weight"], seen)
