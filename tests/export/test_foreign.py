"""Adapters with the key layouts of other tools and older versions: each tensor finds its one home, or is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from mmft.errors import ExportError
from mmft.export.layout import export_layout
from mmft.export.merge import merge_adapter
from mmft.export.verify import verify_merge
from tests.export import zoo

torch.set_num_threads(1)
PEFT = "base_model.model."
Rename = Callable[[str], str]


def _inner(pattern: str, new: str) -> Rename:
    return lambda key: re.sub(pattern, new, key)


def _named(adapter: str) -> Rename:
    """A state dict as the model has it in memory, with the adapter's name in every key."""

    def rename(key: str) -> str:
        if ".lora_" in key:
            return re.sub(r"\.weight$", f".{adapter}.weight", key)
        return key.replace("multi_modal_projector.", f"multi_modal_projector.modules_to_save.{adapter}.")

    return rename


TOOLS: dict[str, Rename] = {
    "adapter-name": _named("default"),
    "swift-named": _named("my_lora"),
    "ddp": lambda key: f"module.{key}",
    "ddp-inside": lambda key: key.replace(PEFT, f"{PEFT}module."),
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled-inside": lambda key: key.replace(PEFT, f"{PEFT}_orig_mod."),
    "compiled-layers": _inner(r"layers\.(\d+)\.", r"layers.\1._orig_mod."),
    "fsdp": _inner(r"layers\.(\d+)\.", r"_fsdp_wrapped_module.layers.\1._checkpoint_wrapped_module."),
    "twice": lambda key: PEFT + key,
    "bare": lambda key: key.removeprefix(PEFT),
    "trl-compiled-ddp": lambda key: "module._orig_mod." + _named("default")(key),
}
OLD: dict[str, dict[str, str]] = {
    # transformers before 4.52 (LLaMA-Factory, ms-swift and Unsloth of that time), and 4.52 to 4.57
    "llava": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower.vision_model."},
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "mllama": {"model.language_model.": "language_model.model.", "model.vision_model.": "vision_model."},
    "llava_next": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
    },
    "internvl": {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."},
    "paligemma": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
    },
}


def renamed(adapter: Path, folder: Path, rename: Rename) -> Path:
    shutil.copytree(adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    other = {rename(key): value for key, value in tensors.items()}
    assert other.keys() != tensors.keys() and len(other) == len(tensors)
    save_file(other, folder / "adapter_model.safetensors")
    return folder


def assert_same_files(one: Path, other: Path) -> None:
    want, got = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("plain")
    base = zoo.save_tiny(folder / "base", "llava")
    options = {"target_modules": ["q_proj", "down_proj", "fc1"], "modules_to_save": ["multi_modal_projector"]}
    adapter = zoo.adapt(base, folder / "adapter", **options)
    merge_adapter(base, adapter, folder / "merged")
    return base, adapter, folder / "merged"


@pytest.mark.parametrize("tool", TOOLS)
def test_wrapped_names(tool: str, plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = plain
    other = renamed(adapter, tmp_path / "adapter", TOOLS[tool])
    merge_adapter(base, other, tmp_path / "merged")
    assert_same_files(merged, tmp_path / "merged")
    verify_merge(base, other, tmp_path / "merged")


@pytest.mark.parametrize("kind", OLD)
def test_older_layouts(kind: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", kind)
    adapter = zoo.adapt(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")

    def old(key: str) -> str:
        for new, before in OLD[kind].items():
            if key.startswith(PEFT + new):
                return PEFT + before + key.removeprefix(PEFT + new)
        return key

    other = renamed(adapter, tmp_path / "other", old)
    merge_adapter(base, other, tmp_path / "again")
    assert_same_files(tmp_path / "merged", tmp_path / "again")


def test_a_text_model_s_adapter_finds_the_language_model(tmp_path: Path) -> None:
    """Trained on the language model alone (`model.layers.0…`), merged into the whole."""
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = zoo.adapt(base, tmp_path / "adapter", target_modules=r".*language_model.*\.(q_proj|down_proj)")
    merge_adapter(base, adapter, tmp_path / "merged")
    other = renamed(adapter, tmp_path / "other", lambda key: key.replace("model.language_model.", "model."))
    merge_adapter(base, other, tmp_path / "again")
    assert_same_files(tmp_path / "merged", tmp_path / "again")


def test_each_key_without_a_home_is_named(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = plain
    other = renamed(adapter, tmp_path / "other", lambda key: key.replace("vision_tower", "image_tower"))
    lost = [key for key in load_file(other / "adapter_model.safetensors") if "image_tower" in key]
    with pytest.raises(ExportError, match=f"{len(lost)} of .* have no home") as caught:
        merge_adapter(base, other, tmp_path / "merged")
    assert sorted(lost)[0] in str(caught.value) and not (tmp_path / "merged").exists()


def test_two_adapters_in_one_file_are_refused(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = plain
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {
        key.replace(".weight", ".second.weight"): value.clone() for key, value in tensors.items() if "lora_" in key
    }
    save_file(tensors, other / "adapter_model.safetensors")
    with pytest.raises(ExportError, match="have no home"):
        merge_adapter(base, other, tmp_path / "merged")


@pytest.mark.parametrize("kind", OLD)
def test_layout_of_a_named_version(kind: str, tmp_path: Path) -> None:
    """There and back: the old layout merges to the same bytes, and peft loads what comes back."""
    base = zoo.save_tiny(tmp_path / "base", kind)
    adapter = zoo.adapt(base, tmp_path / "adapter")
    keys = export_layout(adapter, tmp_path / "old", "4.51", base=base)
    assert any(old != new for new, old in keys.items())
    assert set(load_file(tmp_path / "old/adapter_model.safetensors")) == set(keys.values())
    before = {PEFT + b for b in OLD[kind].values()}
    assert all(any(key.startswith(b) for b in before) or "proj" in key for key in keys.values())
    modules = json.loads((tmp_path / "old/adapter_config.json").read_text())["target_modules"]
    assert {key.removeprefix(PEFT).rsplit(".lora_", 1)[0] for key in keys.values()} == set(modules)
    export_layout(tmp_path / "old", tmp_path / "new", "current")  # the config names the base
    one = load_file(adapter / "adapter_model.safetensors")
    two = load_file(tmp_path / "new/adapter_model.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    want = PeftModel.from_pretrained(zoo.load(base), str(adapter)).merge_and_unload().state_dict()
    got = PeftModel.from_pretrained(zoo.load(base), str(tmp_path / "new")).merge_and_unload().state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
    merge_adapter(base, adapter, tmp_path / "merged")
    merge_adapter(base, tmp_path / "old", tmp_path / "again")
    assert_same_files(tmp_path / "merged", tmp_path / "again")


@pytest.mark.parametrize("kind", ["smolvlm", "idefics3"])
def test_names_that_never_moved_stay(kind: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", kind)
    keys = export_layout(zoo.adapt(base, tmp_path / "adapter"), tmp_path / "old", "4.51", base=base)
    assert keys and all(old == new for new, old in keys.items())


def test_layout_is_checked(plain: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = plain
    with pytest.raises(ExportError, match="'3.0' is unknown") as caught:
        export_layout(adapter, tmp_path / "old", "3.0", base=base)
    assert "4.51" in str(caught.value)


def test_headless_base(tmp_path: Path) -> None:
    """An adapter of the model without its head merges into the folder of the model with one."""
    base = zoo.save_tiny(tmp_path / "base", "llava")
    inner = zoo.load(base).model
    tuned = get_peft_model(inner, LoraConfig(r=4, target_modules=["q_proj"]))
    zoo.randomize(tuned, 1)
    tuned.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    want = tuned.merge_and_unload().state_dict()
    got = zoo.load(tmp_path / "merged").model.state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
