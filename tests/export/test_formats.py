"""The Hugging Face export: same names, chosen type and shards, dequantized where bitsandbytes quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmft.backbones.quantize import dequantized_weight
from mmft.errors import ExportError
from mmft.export import shards
from mmft.export.dequantized import open_weights
from mmft.export.formats import export_folder, plain_base
from mmft.export.merge import merge_adapter
from tests.export import zoo
from tests.tiny import save_tiny_vlm
from tests.tiny_quantized import KINDS, save_quantized


def keys(folder: Path) -> dict[str, str]:
    """Every tensor of a folder and the type it is stored in."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            found |= {key: stream.get_slice(key).get_dtype() for key in stream.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_vl", "mllama", "paligemma", "internvl"])
def test_names_are_those_of_the_base(kind: str, tmp_path: Path) -> None:
    """vLLM and transformers read the names of the hub's checkpoint; which are not those in memory."""
    base = zoo.save_tiny(tmp_path / "base", kind)
    report = export_folder(base, tmp_path / "out", to="hf", dtype="bfloat16", max_shard_size="50KB")
    found = keys(tmp_path / "out")
    assert found.keys() == keys(base).keys() and set(found.values()) == {"BF16"}
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    assert index["weight_map"].keys() == found.keys() and len(report["files"]) > 1
    assert (
        index["metadata"]["total_size"]
        == report["total_size"]
        == sum(value.numel() * 2 for file in base.glob("*.safetensors") for value in load_file(file).values())
    )
    want, got = zoo.load(base, torch.bfloat16).state_dict(), zoo.load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, got[name]) for name, value in want.items())


def test_same_type_keeps_the_bytes(tmp_path: Path) -> None:
    base = save_tiny_vlm(tmp_path / "base", "llava")
    export_folder(base, tmp_path / "out", to="hf")
    want, got = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"MANIFEST.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_become_what_they_compute_with(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to the loaded layers' own dequantized weights, also when read in rows that cut nothing evenly."""
    quantized, model = save_quantized(tmp_path / "q", kind)
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 64)
    export_folder(quantized, tmp_path / "out", to="hf")
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    layers = 0
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            assert torch.equal(plain[f"{name}.weight"], dequantized_weight(module, torch.bfloat16)), name
            layers += 1
    assert layers == 14
    with open_weights(quantized) as weights:
        name = next(key for key in weights.entries if key.endswith("layers.0.mlp.down_proj.weight"))
        whole = weights.read(name)
        assert torch.equal(weights.read(name, 3, 10), whole[3:10])
        assert b"".join(weights.pieces(name)) == bytes(shards.as_bytes(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_onto_a_quantized_checkpoint(kind: str, tmp_path: Path) -> None:
    """An adapter merged onto the dequantized weights: `W + s B A` with `W` as the layer dequantizes it."""
    from peft import PeftModel

    quantized, _ = save_quantized(tmp_path / "q", kind)
    with plain_base(quantized, tmp_path / "merged") as base:
        adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
        merge_adapter(base, adapter, tmp_path / "merged")
        want = PeftModel.from_pretrained(zoo.load(base), str(adapter)).merge_and_unload().state_dict()
    assert not list(tmp_path.glob(".*"))
    got = zoo.load(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, got[name]) for name, value in want.items())
    plain = save_tiny_vlm(tmp_path / "plain", "llava")
    with plain_base(plain, tmp_path / "x") as same:
        assert same == plain


def test_what_is_refused(tmp_path: Path) -> None:
    base = save_tiny_vlm(tmp_path / "base", "llava")
    out = tmp_path / "out"
    cases = [
        ({"to": "onxx"}, "the format 'onxx' is unknown", "nearest: 'onnx'"),
        ({"to": "hf", "dtype": "int8"}, "the type 'int8' is unknown", "float32, bfloat16, float16"),
        ({"to": "hf", "max_shard_size": "many"}, "is not a size", "5GB"),
        ({"to": "adapter"}, "is not an adapter folder", "adapter_config.json"),
    ]
    for options, what, also in cases:
        with pytest.raises(ExportError, match=what) as caught:
            export_folder(base, out, **options)
        assert also in str(caught.value) and not out.exists()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match="this format needs whole weights") as caught:
        export_folder(tmp_path / "adapter", out, to="onnx")
    assert "mmft merge" in str(caught.value)
    with pytest.raises(ExportError, match="neither a run nor a model folder"):
        export_folder(tmp_path, out, to="hf")
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(ExportError, match="has no merged/ or model/"):
        export_folder(tmp_path, out, to="hf")
    out.mkdir()
    with pytest.raises(ExportError, match="out exists already"):
        export_folder(base, out, to="hf")


def test_other_quantizations_cannot_be_turned_back(tmp_path: Path) -> None:
    base = save_tiny_vlm(tmp_path / "base", "llava")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ExportError, match="quantized by gptq, which mmft cannot turn back into 16 bits"):
        export_folder(base, tmp_path / "out", to="hf")


def test_overflow_is_refused(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    tensors = load_file(base / "model.safetensors")
    key = sorted(tensors)[3]
    tensors[key].view(-1)[0] = 1e6
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match="holds values that float16 cannot") as caught:
        export_folder(base, tmp_path / "out", to="hf", dtype="float16")
    assert key in str(caught.value) and not (tmp_path / "out").exists()


def test_an_adapter_in_an_older_layout(tmp_path: Path) -> None:
    """The verb hands on to the layout's own code, which test_merge and its like prove; here it writes a peft folder."""
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=r".*language_model.*q_proj")
    report = export_folder(adapter, tmp_path / "old", to="adapter", layout="transformers-4.51", base=base)
    found = load_file(tmp_path / "old/adapter_model.safetensors")
    assert len(found) == report["tensors"] == 4
    assert all(key.startswith("base_model.model.language_model.model.layers.") for key in found)
    with pytest.raises(ExportError, match="no layout is named"):
        export_folder(adapter, tmp_path / "no", to="adapter")
