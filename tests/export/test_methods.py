"""Every method's streamed merge against peft's merge_and_unload, bit by bit, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from mmft.errors import ExportError
from mmft.export import shards
from mmft.export.deltas.rotation import butterfly
from mmft.export.merge import merge_adapter
from mmft.export.verify import verify_merge
from tests.export import zoo

torch.set_num_threads(1)
TARGETS = ["q_proj", "down_proj", "fc1"]
METHODS: dict[str, Callable[[list[str]], Any]] = {
    "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=t[1:]),
    "vera": lambda t: peft.VeraConfig(r=4, target_modules=t),
    "vera-drawn": lambda t: peft.VeraConfig(r=4, target_modules=t, save_projection=False, projection_prng_key=7),
    "oft": lambda t: peft.OFTConfig(r=0, oft_block_size=8, target_modules=t),
    "oft-cayley": lambda t: peft.OFTConfig(r=0, oft_block_size=4, target_modules=t, use_cayley_neumann=False),
    "oft-shared": lambda t: peft.OFTConfig(r=0, oft_block_size=8, target_modules=t, block_share=True),
    "coft": lambda t: peft.OFTConfig(r=4, oft_block_size=0, target_modules=t, coft=True, eps=1e-2),
    "boft": lambda t: peft.BOFTConfig(boft_block_size=4, target_modules=t),
    "loha": lambda t: peft.LoHaConfig(r=4, alpha=3, target_modules=t, rank_pattern={"q_proj": 2}),
    "lokr": lambda t: peft.LoKrConfig(r=2, alpha=3, target_modules=t),
    "lokr-both": lambda t: peft.LoKrConfig(r=1, alpha=3, target_modules=t, decompose_both=True, decompose_factor=4),
    "lokr-whole": lambda t: peft.LoKrConfig(r=16, target_modules=t),
    "adalora": lambda t: peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=10, target_modules=t),
    "norms": lambda _: peft.LNTuningConfig(target_modules=["input_layernorm", "layer_norm1", "norm"]),
    "tokens": lambda _: peft.TrainableTokensConfig(token_indices=[3, 77, 159], target_modules=["embed_tokens"]),
    "lora+tokens": lambda t: LoraConfig(r=4, target_modules=t, trainable_token_indices={"embed_tokens": [1, 149]}),
    "parameters": lambda _: LoraConfig(r=4, target_modules=[], target_parameters=["mlp.up_proj.weight"]),
}


def adapt(base: Path, folder: Path, config: Any, *, model: nn.Module | None = None) -> Path:
    """An adapter of any method, all its tensors random (rotations small, scales near one)."""
    tuned = get_peft_model(zoo.load(base) if model is None else model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tuned.save_pretrained(folder)
    return folder


def assert_same(want: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    assert want.keys() == got.keys()
    assert [name for name in want if want[name].dtype != got[name].dtype] == []
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_bits_of_peft(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=dtype)
    adapter = adapt(base, tmp_path / "adapter", METHODS[method](TARGETS))
    report = merge_adapter(base, adapter, tmp_path / "merged")
    want, got = zoo.merged_by_peft(base, adapter), zoo.load(tmp_path / "merged").state_dict()
    assert_same(want, got)
    changed = {name for name, value in zoo.load(base).state_dict().items() if not torch.equal(value, got[name])}
    assert changed == {change.name for change in report.changes} and changed
    proof = verify_merge(base, adapter, tmp_path / "merged")
    assert proof.touched == len(report.changes) and proof.worst <= 1


@pytest.mark.parametrize("method", ["vera", "oft", "boft", "loha", "lokr", "adalora", "ia3"])
def test_row_blocks_do_not_change_bits(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", hidden_size=192, intermediate_size=320)
    adapter = adapt(base, tmp_path / "adapter", METHODS[method](["q_proj", "down_proj"]))
    merge_adapter(base, adapter, tmp_path / "one")
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 64)
    merge_adapter(base, adapter, tmp_path / "many")
    assert_same(zoo.load(tmp_path / "one").state_dict(), zoo.load(tmp_path / "many").state_dict())


CONVOLUTIONS: dict[str, Callable[[list[str]], Any]] = {
    "dora": lambda t: LoraConfig(r=4, target_modules=t, use_dora=True),
    "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=t[:1]),
    "oft": lambda t: peft.OFTConfig(r=0, oft_block_size=8, target_modules=t),
    "boft": lambda t: peft.BOFTConfig(boft_block_size=4, target_modules=t),
    "loha": lambda t: peft.LoHaConfig(r=4, target_modules=t),
    "loha-tucker": lambda t: peft.LoHaConfig(r=4, target_modules=t, use_effective_conv2d=True),
    "lokr": lambda t: peft.LoKrConfig(r=2, target_modules=t),
    "lokr-tucker": lambda t: peft.LoKrConfig(r=2, target_modules=t, use_effective_conv2d=True),
}


@pytest.mark.parametrize("method", CONVOLUTIONS)
def test_convolutions(method: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "fast_vlm")
    sizes = {(1, 1): 24, (3, 3): 8}
    found = {
        size: name
        for name, module in reversed(list(zoo.load(base).named_modules()))
        if isinstance(module, nn.Conv2d) and module.groups == 1 and (size := module.kernel_size) in sizes
    }
    targets = sorted(found.values())
    if method in ("oft", "boft"):  # whose block size must divide 3 · 3 · in: the stem has 3 channels
        targets = [found[(1, 1)]]
    adapter = adapt(base, tmp_path / "adapter", CONVOLUTIONS[method](targets))
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same(zoo.merged_by_peft(base, adapter), zoo.load(tmp_path / "merged").state_dict())
    verify_merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("method", ["dora", "ia3", "vera", "adalora"])
def test_weights_that_lie_the_other_way(method: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D holds (in, out): DoRA's norms and (IA)³'s scale go along columns there."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_fc"]
    config = {
        "dora": LoraConfig(r=4, target_modules=targets, use_dora=True, fan_in_fan_out=True),
        "ia3": peft.IA3Config(target_modules=targets, feedforward_modules=["c_fc"], fan_in_fan_out=True),
        "vera": peft.VeraConfig(r=4, target_modules=targets, fan_in_fan_out=True),
        "adalora": peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=targets, fan_in_fan_out=True),
    }[method]
    adapter = adapt(tmp_path / "base", tmp_path / "adapter", config, model=model)
    merge_adapter(tmp_path / "base", adapter, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    want = PeftModel.from_pretrained(again, str(adapter)).merge_and_unload().state_dict()
    assert_same(dict(want), AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict())
    verify_merge(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=["dora", "rslora"])
def test_tables(options: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=dtype)
    adapter = adapt(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], **options))
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same(zoo.merged_by_peft(base, adapter), zoo.load(tmp_path / "merged").state_dict())
    verify_merge(base, adapter, tmp_path / "merged")


def test_dora_norms_of_a_table_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = adapt(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True))
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", 64)
    merge_adapter(base, adapter, tmp_path / "merged")
    want, got = zoo.merged_by_peft(base, adapter), zoo.load(tmp_path / "merged").state_dict()
    name = next(name for name in want if name.endswith("embed_tokens.weight"))
    # the norm over 160 rows is summed in float64 here, in float32 there: at most a few last places
    torch.testing.assert_close(got.pop(name), want.pop(name), rtol=4e-7, atol=0)
    assert_same(want, got)


def test_rotated_table(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["embed_tokens"])
    adapter = adapt(base, tmp_path / "adapter", config)
    merge_adapter(base, adapter, tmp_path / "merged")
    assert_same(zoo.merged_by_peft(base, adapter), zoo.load(tmp_path / "merged").state_dict())
    verify_merge(base, adapter, tmp_path / "merged")


def test_adalora_with_pruned_ranks(tmp_path: Path) -> None:
    """A rank_pattern as training leaves it: peft saves only the rows that are left, of one module none."""
    base = zoo.save_tiny(tmp_path / "base", "llava")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=10, target_modules=["q_proj"])
    tuned = get_peft_model(zoo.load(base), config)
    torch.manual_seed(1)
    pattern = {}
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
        if "lora_E" in name:
            keep = [True, False, len(pattern) % 2 == 0, False]
            pattern[name.removeprefix("base_model.model.")] = keep
    tuned.peft_config["default"].rank_pattern = pattern
    tuned.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert_same(zoo.merged_by_peft(base, tmp_path / "adapter"), zoo.load(tmp_path / "merged").state_dict())
    verify_merge(base, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("factors", [2, 3])
def test_butterflies(factors: int, tmp_path: Path) -> None:
    """peft builds more than one butterfly factor on CUDA only; its own permutations give the oracle here."""
    layer = peft.tuners.boft.layer.Linear(nn.Linear(32, 8), "default", peft.BOFTConfig(boft_block_size=4))
    for level in range(factors):
        want = layer.block_butterfly_perm(32, 8 // 2**level, 2, factors - 1)
        assert torch.equal(butterfly(32, 4, level, factors), want)
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = adapt(base, tmp_path / "adapter", peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]))
    tensors = shards.Weights([adapter / "adapter_model.safetensors"])
    key = next(key for key in tensors.entries if key.endswith("layers.1.self_attn.q_proj.boft_R") and "language" in key)
    many = {name: tensors.read(name) for name in tensors.entries}
    many[key] = torch.randn(factors, 8, 4, 4) * 0.3
    from safetensors.torch import save_file

    save_file(many, adapter / "adapter_model.safetensors")
    merge_adapter(base, adapter, tmp_path / "merged")
    name = key.removeprefix("base_model.model.").removesuffix(".boft_R") + ".weight"
    turn = torch.eye(32)
    for level in range(factors):
        blocks = torch.block_diag(*layer.cayley_batch(many[key][level]))
        order = layer.perm2mat(layer.block_butterfly_perm(32, 8 // 2**level, 2, factors - 1))
        turn = order @ blocks @ order.T @ turn
    scale = many[key.replace("boft_R", "boft_s")]
    want = (turn @ zoo.load(base).state_dict()[name].T).T * scale
    got = zoo.load(tmp_path / "merged").state_dict()[name]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    verify_merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    "config, why",
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "adds vectors to the input"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "adds vectors to the input"),
        (peft.HRAConfig(target_modules=["q_proj"]), "type HRA cannot be merged by streaming"),
    ],
    ids=["prompt", "prefix", "hra"],
)
def test_what_no_weight_can_hold(config: Any, why: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    config.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match=why) as caught:
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert "LORA, ADALORA, VERA" in str(caught.value) and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_of_a_residual_base_is_refused(start: str, tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    adapter = adapt(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start))
    with pytest.raises(ExportError, match="would count the start twice") as caught:
        merge_adapter(base, adapter, tmp_path / "merged")
    assert "path_initial_model_for_weight_conversion" in str(caught.value)


def test_a_converted_pissa_adapter_merges(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    tuned = get_peft_model(zoo.load(base), config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tuned.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert_same(zoo.merged_by_peft(base, tmp_path / "adapter"), zoo.load(tmp_path / "merged").state_dict())
