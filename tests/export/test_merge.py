"""The streamed merge against peft's own merge, bit by bit, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

from mmft.errors import ExportError
from mmft.export import shards
from mmft.export.merge import merge_adapter
from mmft.export.names import map_names, meta_model
from mmft.files import verify_folder
from tests.export import zoo

torch.set_num_threads(1)


def assert_same_as_peft(base: Path, adapter: Path, merged: Path, dtype: torch.dtype | None = None) -> None:
    want, got = zoo.merged_by_peft(base, adapter, dtype), zoo.load(merged).state_dict()
    assert want.keys() == got.keys()
    assert [name for name in want if want[name].dtype != got[name].dtype] == []
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def assert_refused(text: str, base: Path, adapter: Path, out: Path, **options: object) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(ExportError, match=text) as caught:
        merge_adapter(base, adapter, out, **options)  # type: ignore[arg-type]
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize("kind", zoo.CONFIGS)
def test_bits_of_peft_for_every_family(kind: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", kind)
    adapter = zoo.adapt(base, tmp_path / "adapter")
    seen: list[tuple[int, int]] = []
    report = merge_adapter(base, adapter, tmp_path / "merged", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (report.total_size, report.total_size) and seen == sorted(seen)
    assert report.untouched + len(report.changes) == report.tensors and len(report.changes) >= 5
    assert_same_as_peft(base, adapter, tmp_path / "merged")
    verify_folder(tmp_path / "merged")
    assert load_file(base / "model.safetensors").keys() == load_file(tmp_path / "merged/model.safetensors").keys()


@pytest.mark.parametrize("kind", ["llava", "llava_next", "paligemma"])
def test_towers_of_older_hub_checkpoints(kind: str, tmp_path: Path) -> None:
    """`vision_tower.vision_model.encoder…`, as every LLaVA on the hub has it."""
    base = zoo.save_tiny(tmp_path / "base", kind)
    check_layout(base, lambda key, _: key.replace("vision_tower.", "vision_tower.vision_model."), tmp_path)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "mllama", "paligemma", "internvl"])
def test_names_in_memory_on_disk(kind: str, tmp_path: Path) -> None:
    """`model.language_model.layers…`, as transformers 4.52 to 4.57 wrote some models."""
    check_layout(zoo.save_tiny(tmp_path / "base", kind), lambda _, name: name, tmp_path)


@pytest.mark.parametrize("kind", ["smolvlm", "llava", "qwen2_vl"])
def test_base_model_without_its_head(kind: str, tmp_path: Path) -> None:
    """Saved from the headless class: no `model.` prefix on disk, and the head tied to the embeddings."""
    base = tmp_path / "base"
    zoo.tiny(kind, tie=True).model.save_pretrained(base)
    assert not any(key.startswith("model.") for key in load_file(base / "model.safetensors"))
    adapter = zoo.adapt(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_as_peft(base, adapter, tmp_path / "merged")


def check_layout(base: Path, rename: Callable[[str, str], str], tmp_path: Path) -> None:
    modern = zoo.load(base).state_dict()
    names = map_names(meta_model(base), shards.Weights([base / "model.safetensors"]).entries)
    tensors = load_file(base / "model.safetensors")
    other = {rename(key, names.runtime[key]): value for key, value in tensors.items()}
    assert other.keys() != tensors.keys()
    save_file(other, base / "model.safetensors", metadata={"format": "pt"})
    assert all(torch.equal(value, modern[name]) for name, value in zoo.load(base).state_dict().items())
    adapter = zoo.adapt(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_as_peft(base, adapter, tmp_path / "merged")
    assert load_file(tmp_path / "merged/model.safetensors").keys() == other.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers.\d+.mlp.down_proj": 3}},
        {"lora_bias": True, "target_modules": ["fc1", "fc2", "linear_1"]},
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["multi_modal_projector", "lm_head"], "target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["rslora", "patterns", "lora-bias", "bias-all", "dora", "modules-to-save+embedding"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_options(options: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=dtype)
    options = {**options, "target_modules": options.get("target_modules", ["q_proj", "v_proj", "down_proj", "fc1"])}
    adapter = zoo.adapt(base, tmp_path / "adapter", **options)
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_as_peft(base, adapter, tmp_path / "merged")


def test_convolutions(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "fast_vlm")
    model = zoo.load(base)
    convs = [
        (name, module.kernel_size)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1
    ]
    chosen = [next(name for name, size in convs if size == want) for want in ((1, 1), (3, 3))]
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=[*chosen, "q_proj"])
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same_as_peft(base, adapter, tmp_path / "merged")


def test_fan_in_fan_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    zoo.randomize(tuned, 1)
    tuned.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    want = tuned.merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(value, got[name]) for name, value in want.items())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("how", ["lora", "save"])
def test_tied_embeddings_are_untied(target: str, how: str, tmp_path: Path) -> None:
    """peft merges into the shared tensor and so changes both ends; the adapter model changes one."""
    base = zoo.save_tiny(tmp_path / "base", "qwen2_vl", tie=True)
    assert not any("lm_head" in key for key in load_file(base / "model.safetensors"))
    options = {"target_modules": ["q_proj", target]} if how == "lora" else {"modules_to_save": [target]}
    adapter = zoo.adapt(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **options})
    report = merge_adapter(base, adapter, tmp_path / "merged")
    assert report.untied == ("lm_head.weight",)
    model = PeftModel.from_pretrained(zoo.load(base), str(adapter)).eval()
    merged = zoo.load(tmp_path / "merged")
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    for row in zoo.text_rows(merged):
        torch.testing.assert_close(merged(**row).logits, model(**row).logits, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_stay_tied_when_untouched(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "smolvlm", tie=True)
    adapter = zoo.adapt(base, tmp_path / "adapter")
    assert merge_adapter(base, adapter, tmp_path / "merged").untied == ()
    merged = zoo.load(tmp_path / "merged")
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    assert_same_as_peft(base, adapter, tmp_path / "merged")


def test_fused_on_disk_split_in_memory(tmp_path: Path) -> None:
    """hrm_text keeps gate and up (and four attention projections) fused on disk and apart in memory."""
    from transformers import HrmTextConfig

    sizes = {**zoo.TEXT, "num_key_value_heads": 4, "num_layers_per_stack": 1, "head_dim": 8}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HrmTextConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["up_proj", "v_proj"]))
    zoo.randomize(tuned, 1)
    tuned.save_pretrained(tmp_path / "adapter")
    disk = load_file(tmp_path / "base/model.safetensors")
    assert any("gate_up_proj" in key for key in disk) and not any("up_proj" in key.split(".") for key in disk)
    report = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert any(", " not in change.key for change in report.changes)
    want = tuned.merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_row_blocks_do_not_change_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=torch.bfloat16)
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens", "fc1", "lm_head"])
    merge_adapter(base, adapter, tmp_path / "one")
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 64)
    merge_adapter(base, adapter, tmp_path / "many", max_shard_size="20KB")
    one, many = zoo.load(tmp_path / "one").state_dict(), zoo.load(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        e.nbytes for e in shards.Weights([tmp_path / "one/model.safetensors"]).entries.values()
    )
    assert len(set(index["weight_map"].values())) > 5


def test_sharded_base_dtype_and_copied_files(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", max_shard_size="50KB")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    blob = tmp_path / "blob"
    blob.write_text("{}")
    (base / "tokenizer.json").symlink_to(blob)
    adapter = zoo.adapt(base, tmp_path / "adapter")
    old = os.umask(0o027)
    try:
        merge_adapter(base, adapter, tmp_path / "merged", dtype="bfloat16")
    finally:
        os.umask(old)
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {
        "chat_template.jinja",
        "tokenizer.json",
        "config.json",
        "generation_config.json",
        "merge_report.json",
    } <= found
    assert not found & {"modeling_evil.py", "pytorch_model.bin", shards.INDEX}
    assert (tmp_path / "merged/model.safetensors").stat().st_mode & 0o777 == 0o640
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"
    assert_same_as_peft(base, adapter, tmp_path / "merged", torch.bfloat16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = zoo.save_tiny(folder / "base", "llava")
    return base, zoo.adapt(base, folder / "adapter")


def test_existing_out_is_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert_refused("exists already", *pair, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_adapter(value: float, pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = sorted(tensors)[3]
    tensors[key].view(-1)[-1] = value
    save_file(tensors, adapter / "adapter_model.safetensors")
    assert key in assert_refused("NaN or Inf in 1 of", pair[0], adapter, tmp_path / "out")


def test_every_tensor_needs_a_home(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    lonely, extra = sorted(tensors)[0], "base_model.model.model.nowhere.lora_A.weight"
    assert lonely.endswith("lora_A.weight")
    tensors[extra] = tensors[lonely]
    del tensors[lonely]
    save_file(tensors, adapter / "adapter_model.safetensors")
    text = assert_refused("2 of .* have no home", pair[0], adapter, tmp_path / "out")
    assert extra in text and lonely.replace("lora_A", "lora_B") in text


def test_wrong_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused("have no home", zoo.save_tiny(tmp_path / "base", "qwen2_vl"), pair[1], tmp_path / "out")


@pytest.mark.parametrize(
    "key, value", [("alora_invocation_tokens", [1]), ("layer_replication", [[0, 1]]), ("brand_new", 3)]
)
def test_unknown_kinds_of_lora_are_refused(key: str, value: object, pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    assert key in assert_refused("cannot be merged by streaming", pair[0], adapter, tmp_path / "out")


def test_damaged_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base = shutil.copytree(pair[0], tmp_path / "base")
    with (base / "model.safetensors").open("r+b") as stream:
        stream.truncate((base / "model.safetensors").stat().st_size - 8)
    assert_refused("its header says", base, pair[1], tmp_path / "out")
    (base / "model.safetensors").unlink()
    assert_refused("holds no safetensors", base, pair[1], tmp_path / "out")


@pytest.mark.parametrize(
    "field, options",
    [
        ("dtype", {"dtype": "int8"}),
        ("merge_onto", {"onto": "x"}),
        ("max_shard_size", {"max_shard_size": "many"}),
        ("dequantized", {"onto": "dequantized"}),
    ],
)
def test_options_are_checked(field: str, options: dict, pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert_refused(field, *pair, tmp_path / "out", **options)


def test_fp16_overflow_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(pair[1], tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: v * 1e4 for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    assert_refused("not finite after the merge", pair[0], adapter, tmp_path / "out", dtype="float16")
