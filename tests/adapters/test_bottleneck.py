"""Bottleneck adapters: the papers' formulas, the identity at the start, and peft's own verbs on them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from mmft.adapters.bottleneck import (
    ACTIVATIONS,
    BottleneckConfig,
    BottleneckLayer,
    bottleneck_config,
    bottleneck_modules,
    register,
    widths,
)
from mmft.backbones.load import load_backbone
from mmft.backbones.parts import find_parts
from mmft.errors import AdapterError
from mmft.recipe.schema import ModelSection, QuantizationSection
from tests.tiny import save_tiny_vlm, tiny_inputs, tiny_vlm

KINDS = ("llava", "qwen2_vl", "mllama", "clip")
TARGETS = {
    "llava": ("language.attention", "language.mlp", "vision.attention", "projector.other"),
    "qwen2_vl": ("language.attention", "language.mlp", "vision.attention", "projector.mlp"),
    "mllama": ("language.attention", "language.mlp", "vision.attention", "cross_attention.attention"),
    "clip": ("language.attention", "language.mlp", "vision.attention", "vision.mlp"),
}
TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TEXT, "hidden_size": 48, "image_size": 32, "patch_size": 8}
IDS = {"bos_token_id": 1, "eos_token_id": 2}


def clip() -> Any:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**TEXT, **IDS}, vision_config=VISION, projection_dim=32, attn_implementation="eager"
    )
    return transformers.CLIPModel(config).eval()


def make(kind: str) -> Any:
    return clip() if kind == "clip" else tiny_vlm(kind)[0]


def inputs(kind: str) -> dict[str, torch.Tensor]:
    if kind != "clip":
        return tiny_inputs(kind)
    source = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, 6), generator=source)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=source)}


def output(model: Any, kind: str) -> torch.Tensor:
    found = model(**inputs(kind))
    return found.logits_per_image if kind == "clip" else found.logits


def names(model: Any, kind: str) -> list[str]:
    parts = find_parts(model)
    return [name for target in TARGETS[kind] for name in bottleneck_modules(parts, model, *target.split("."))]


def wrapped(kind: str, *, seed: int | None = 7, placement: str = "serial", size: int = 8) -> Any:
    """A peft model whose adapter weights are random (None: as they start)."""
    model = make(kind)
    found: Any = get_peft_model(
        model, bottleneck_config(names(model, kind), bottleneck_size=size, placement=placement, scaling=0.5)
    )
    if seed is not None:
        scramble(found, seed)
    return found.eval()


def scramble(model: Any, seed: int, adapter: str = "default") -> None:
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".bottleneck_" in name and f".{adapter}." in name:
                value.copy_(torch.randn(value.shape, generator=source) * 0.3)


def layers(model: Any) -> dict[str, BottleneckLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLayer)
    }


class Block(nn.Module):
    """A sub-layer 6 -> 4 that returns a tuple and is called by keyword, as attention is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = 3
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, str]:
        return self.outer(torch.tanh(self.inner(hidden_states))) * scale, "weights"


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, kept = self.block(hidden_states=x, scale=2.0)
        assert kept == "weights" and self.block.layer_idx == 3
        return hidden


# ---------------------------------------------------------------- formulas


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("placement", ["serial", "parallel"])
def test_the_formulas_in_float64(placement: str, layer_norm: bool, activation: str) -> None:
    torch.manual_seed(0)
    whole = Whole().double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    plain = whole(x)
    config = BottleneckConfig(
        target_modules=["block"],
        bottleneck_size=2,
        placement=placement,
        activation=activation,
        scaling=1.7,
        layer_norm=layer_norm,
        init_weights=False,
    )
    model: Any = get_peft_model(whole, config).double()
    weights = {name.rpartition("bottleneck_")[2]: value for name, value in model.named_parameters()}
    given = x if placement == "parallel" else plain
    if layer_norm:
        mean, square = given.mean(-1, keepdim=True), given.var(-1, unbiased=False, keepdim=True)
        given = (given - mean) / torch.sqrt(square + 1e-5)
    inner = torch.einsum("...i,ri->...r", given, weights["down.default.weight"]) + weights["down.default.bias"]
    curves: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": lambda v: v.clamp(min=0),
        "gelu": lambda v: v * (1 + torch.erf(v / 2**0.5)) / 2,
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "tanh": lambda v: (torch.exp(2 * v) - 1) / (torch.exp(2 * v) + 1),
        "leaky_relu": lambda v: torch.where(v > 0, v, 0.01 * v),
    }
    after = torch.einsum("...r,or->...o", curves[activation](inner), weights["up.default.weight"])
    expected = plain + 1.7 * (after + weights["up.default.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)  # float64, another order of sums
    assert not torch.allclose(model(x), plain)


def test_several_active_adapters_add_up_parallel_ones_first() -> None:
    torch.manual_seed(0)
    whole = Whole()
    x = torch.randn(2, 6)
    model: Any = get_peft_model(
        whole, BottleneckConfig(target_modules=["block"], placement="parallel", init_weights=False)
    )
    model.add_adapter("some", BottleneckConfig(target_modules=["block"], bottleneck_size=3, init_weights=False))
    model.add_adapter("more", BottleneckConfig(target_modules=["block"], bottleneck_size=5, init_weights=False))
    block = model.base_model.model.block

    def branch(name: str, h: torch.Tensor) -> torch.Tensor:
        return block.bottleneck_up[name](torch.relu(block.bottleneck_down[name](h)))

    plain = block.base_layer(x, 2.0)[0]
    model.base_model.set_adapter(["some", "default", "more"])
    middle = plain + branch("default", x)
    torch.testing.assert_close(model(x), middle + branch("some", middle) + branch("more", middle), rtol=0, atol=0)
    model.set_adapter("some")
    torch.testing.assert_close(model(x), plain + branch("some", plain), rtol=0, atol=0)
    trained = {name.split(".")[-2] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"some"}


@pytest.mark.parametrize("placement", ["serial", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_equal_forward_hooks_written_by_hand(kind: str, placement: str) -> None:
    """The same model without peft: a plain hook on every target computes the adapter from its saved weights."""
    model = wrapped(kind, placement=placement)
    state = peft.get_peft_model_state_dict(model)
    plain = make(kind)

    def hook(name: str) -> Callable[..., Any]:
        weights = {
            kind: state[f"base_model.model.{name}.bottleneck_{kind}"]
            for kind in ("down.weight", "down.bias", "up.weight", "up.bias")
        }

        def run(_: Any, args: Any, kwargs: Any, result: Any) -> Any:
            hidden = result[0] if isinstance(result, tuple) else result
            given = hidden if placement == "serial" else (args[0] if args else next(iter(kwargs.values())))
            inner = torch.relu(given @ weights["down.weight"].T + weights["down.bias"])
            changed = hidden + 0.5 * (inner @ weights["up.weight"].T + weights["up.bias"])
            return (changed, *result[1:]) if isinstance(result, tuple) else changed

        return run

    with torch.no_grad():
        before = output(plain, kind)
        for name in names(plain, kind):
            plain.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
        found, expected = output(model, kind), output(plain, kind)
    # fp32: a fused linear and a product with a sum differ in the last bits, a few layers deep
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-2


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("placement", ["serial", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_identity_and_only_adapters_learn(kind: str, placement: str) -> None:
    model = wrapped(kind, seed=None, placement=placement)
    with torch.no_grad():
        assert torch.equal(output(model, kind), output(make(kind), kind))
    scramble(model, 1)
    before = copy.deepcopy(model.state_dict())
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    output(model, kind).square().mean().backward()
    for name, value in model.named_parameters():
        assert (value.grad is not None) == (".bottleneck_" in name) == value.requires_grad, name
        assert value.grad is None or value.grad.abs().sum() > 0, name
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".bottleneck_" in name}
    assert len(layers(model)) == len(names(make(kind), kind)) > 0


@pytest.mark.parametrize("placement", ["serial", "parallel"])
def test_gradient_checkpointing_changes_no_gradient(placement: str) -> None:
    gradients = []
    for on in (False, True):
        model = wrapped("llava", placement=placement)
        model.train()
        if on:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        output(model, "llava").square().mean().backward()
        gradients.append({name: v.grad for name, v in model.named_parameters() if v.requires_grad})
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


def test_dropout_sits_in_the_adapter_alone() -> None:
    torch.manual_seed(0)
    config = BottleneckConfig(target_modules=["block"], bottleneck_size=64, dropout=0.5, init_weights=False)
    model: Any = get_peft_model(Whole(), config)
    x = torch.randn(4, 6)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    block = model.base_model.model.block
    torch.manual_seed(5)
    found = model(x)
    torch.manual_seed(5)
    plain = block.base_layer(x, 2.0)[0]
    inner = torch.relu(block.bottleneck_down["default"](plain))
    kept = torch.nn.functional.dropout(inner, 0.5)
    assert torch.equal(found, plain + block.bottleneck_up["default"](kept))


def test_adapters_are_float32_on_a_bfloat16_base_unless_peft_is_told_otherwise() -> None:
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = tiny_vlm("llava")[0].to(torch.bfloat16)
        config = bottleneck_config(names(model, "llava"), bottleneck_size=8)
        found: Any = get_peft_model(model, config, autocast_adapter_dtype=autocast)
        assert {v.dtype for n, v in found.named_parameters() if ".bottleneck_" in n} == {dtype}
        with torch.no_grad():
            pixels = inputs("llava")["pixel_values"].to(torch.bfloat16)
            assert found(**{**inputs("llava"), "pixel_values": pixels}).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("section", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_quantized_layers_inside_a_block_stay_as_they_are(tmp_path: Path, section: dict[str, bool]) -> None:
    folder = save_tiny_vlm(tmp_path / "base", "llava")
    model_section = ModelSection(name_or_path=str(folder), dtype="bfloat16")
    backbone = load_backbone(model_section, QuantizationSection.model_validate(section))
    wanted = bottleneck_modules(backbone.parts, backbone.model, "language", "attention")
    packed = {n: v.clone() for n, v in backbone.model.named_parameters() if not v.dtype.is_floating_point}
    batch = {n: v.bfloat16() if v.dtype.is_floating_point else v for n, v in inputs("llava").items()}
    with torch.no_grad():
        before = backbone.model(**batch).logits
    model: Any = get_peft_model(backbone.model, bottleneck_config(wanted, bottleneck_size=8))
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    model(**batch).logits.float().square().mean().backward()
    trained = {n: v for n, v in model.named_parameters() if v.requires_grad}
    assert trained and all(v.dtype == torch.float32 and v.grad is not None for v in trained.values())
    after = {n.removeprefix("base_model.model.").replace(".base_layer", ""): v for n, v in model.named_parameters()}
    assert packed and all(torch.equal(value, after[name]) for name, value in packed.items())


# ---------------------------------------------------------------- peft's verbs


def test_disable_switch_delete_and_unload() -> None:
    model = wrapped("llava", seed=1)
    with torch.no_grad():
        base, first = output(make("llava"), "llava"), output(model, "llava")
        model.add_adapter("other", bottleneck_config(names(make("llava"), "llava"), bottleneck_size=4))
        scramble(model, 2, "other")
        assert torch.equal(output(model, "llava"), first)
        with model.disable_adapter():
            assert torch.equal(output(model, "llava"), base)
        model.set_adapter("other")
        second = output(model, "llava")
        assert not torch.allclose(second, first)
        assert {n.split(".")[-2] for n, v in model.named_parameters() if v.requires_grad} == {"other"}
        model.delete_adapter("other")
        model.set_adapter("default")
        assert torch.equal(output(model, "llava"), first)
        plain = model.unload()
        assert torch.equal(output(plain, "llava"), base)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in make("llava").named_parameters()]


@pytest.mark.parametrize("placement", ["serial", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_outputs_are_equal(tmp_path: Path, kind: str, placement: str) -> None:
    model = wrapped(kind, placement=placement)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "BOTTLENECK" and values["placement"] == placement and values["bottleneck_size"] == 8
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert type(config) is BottleneckConfig and config.peft_type == "BOTTLENECK"
    told = {"inference_mode", "auto_mapping"}  # peft writes what it knows only at this moment
    given = model.peft_config["default"].to_dict()
    assert {n: v for n, v in config.to_dict().items() if n not in told} == {
        n: v for n, v in given.items() if n not in told
    }
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {
        f"base_model.model.{name}.bottleneck_{leaf}"
        for name in layers(model)
        for leaf in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    loaded: Any = PeftModel.from_pretrained(make(kind), str(tmp_path)).eval()
    lean: Any = PeftModel.from_pretrained(make(kind), str(tmp_path), low_cpu_mem_usage=True).eval()
    assert not [name for name, value in loaded.named_parameters() if value.requires_grad]
    with torch.no_grad():
        expected = output(model, kind)
        assert torch.equal(output(loaded, kind), expected)
        assert torch.equal(output(lean, kind), expected)


def test_a_plain_peft_process_loads_it_after_one_import(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "base", "llava")
    model = wrapped("llava")
    model.save_pretrained(tmp_path / "adapter")
    batch = inputs("llava")
    save_file({name: value.contiguous() for name, value in batch.items()}, tmp_path / "inputs.safetensors")
    code = (
        "import sys, torch\nimport mmft.adapters.bottleneck\nfrom peft import PeftModel\n"
        "from safetensors.torch import load_file, save_file\nfrom transformers import AutoModelForImageTextToText\n"
        "base = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2]).eval()\n"
        "with torch.no_grad():\n"
        "    save_file({'logits': model(**load_file(sys.argv[3])).logits}, sys.argv[4])\n"
    )
    files = [folder, tmp_path / "adapter", tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, files)], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(load_file(files[-1])["logits"], output(model, "llava"))


def test_merging_is_refused_and_leaves_the_model_alone() -> None:
    model = wrapped("llava")
    with torch.no_grad():
        before = output(model, "llava")
        for attempt in (model.merge_and_unload, model.merge_adapter, next(iter(layers(model).values())).merge):
            with pytest.raises(AdapterError, match=r"cannot be merged: no weight .*activation function(.|\n)*LoRA"):
                attempt()
        assert torch.equal(output(model, "llava"), before)
    assert not BottleneckConfig.mergeable and not model.base_model.mergeable


def test_registering_twice_is_one_registration_and_a_foreign_method_is_refused(monkeypatch: Any) -> None:
    register()
    table: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    assert table["BOTTLENECK"] is BottleneckConfig and list(table).count("BOTTLENECK") == 1
    monkeypatch.setitem(table, "BOTTLENECK", PeftConfig)
    with pytest.raises(AdapterError, match=r"method BOTTLENECK of its own \(peft.config\)"):
        register()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"placement": "paralel"}, "placement 'paralel' is unknown(.|\n)*nearest: 'parallel'"),
        ({"activation": "gleu"}, "activation 'gleu' is unknown(.|\n)*nearest: 'gelu'"),
        ({"bottleneck_size": 0}, "bottleneck_size 0 is no width"),
        ({"dropout": 1.0}, "dropout 1.0 is out of range"),
    ],
)
def test_bad_settings(values: dict[str, Any], text: str) -> None:
    with pytest.raises(AdapterError, match=text):
        BottleneckConfig(target_modules=["mlp"], **values)


def test_targets_that_hold_each_other_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"layers.0.mlp.\w+ lies inside \S+layers.0.mlp"):
        get_peft_model(make("llava"), BottleneckConfig(target_modules=["mlp", "down_proj", "fc2"]))
    model = get_peft_model(make("llava"), BottleneckConfig(target_modules=["down_proj"]))
    with pytest.raises(AdapterError, match="layers.0.mlp holds adapters already"):
        model.add_adapter("outer", BottleneckConfig(target_modules=["language_model.layers.0.mlp"]))


def test_a_module_that_does_not_fit_says_so() -> None:
    class Odd(nn.Module):
        def __init__(self, result: Any) -> None:
            super().__init__()
            self.block = Block()
            self.block.forward = lambda x: result  # type: ignore[method-assign]

        def forward(self, x: torch.Tensor) -> Any:
            return self.block(x)

    for result, text in (
        ({"h": torch.ones(2, 4)}, "it returns dict, not a tensor"),
        (torch.ones(2, 5), "hidden state has width 5, the adapter was made for 4"),
    ):
        model: Any = get_peft_model(Odd(result), BottleneckConfig(target_modules=["block"]))
        with pytest.raises(AdapterError, match=f"(?s)no bottleneck adapter fits block \\(Block\\).*{text}"):
            model(torch.ones(2, 6))
    shorter: Any = get_peft_model(
        Odd((torch.ones(1, 4),)), BottleneckConfig(target_modules=["block"], placement="parallel")
    )
    with pytest.raises(AdapterError, match=r"makes \(2, 4\) of its input, the module \(1, 4\)"):
        shorter(torch.ones(2, 6))
    with pytest.raises(AdapterError, match="it holds no linear layer that tells the width"):
        widths(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)), None, "act")


# ---------------------------------------------------------------- which modules


def small(name: str) -> Any:
    vit = {name: value for name, value in VISION.items() if name != "vocab_size"}
    speech = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
              (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    ids = {**IDS, "pad_token_id": 0, "decoder_start_token_id": 1}
    configs: dict[str, Callable[[], Any]] = {
        "bert": lambda: transformers.BertConfig(**TEXT),
        "whisper": lambda: transformers.WhisperConfig(vocab_size=99, d_model=32, **speech, **ids),
        "t5": lambda: transformers.T5Config(vocab_size=99, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4),
        "swinv2": lambda: transformers.Swinv2Config(
            image_size=32, patch_size=4, embed_dim=24, depths=[1, 1], num_heads=[2, 4], window_size=4
        ),
        "siglip": lambda: transformers.SiglipConfig(text_config=TEXT, vision_config=vit),
        "mixtral": lambda: transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, **IDS),
    }
    return transformers.AutoModel.from_config(configs[name]())


@pytest.mark.parametrize(
    ("name", "home", "expected", "size", "parallel"),
    [
        ("bert", ("language", "attention"), "encoder.layer.{}.attention.output.dense", (32, 32), False),
        ("bert", ("language", "mlp"), "encoder.layer.{}.output.dense", (64, 32), False),
        ("whisper", ("language", "attention"), "decoder.layers.{}.self_attn", (32, 32), True),
        ("whisper", ("language", "mlp"), "decoder.layers.{}.fc2", (64, 32), False),
        ("whisper", ("cross_attention", "attention"), "decoder.layers.{}.encoder_attn", (32, 32), True),
        ("t5", ("cross_attention", "attention"), "decoder.block.{}.layer.1.EncDecAttention", (32, 32), True),
        ("siglip", ("vision", "mlp"), "vision_model.encoder.layers.{}.mlp", (48, 48), True),
    ],
)
def test_the_sub_layers_of_other_families(
    name: str, home: tuple[str, str], expected: str, size: tuple[int, int], parallel: bool
) -> None:
    """The layer's code says where the sub-layer's output is before the residual is added."""
    model = small(name)
    parts, modules = find_parts(model), dict(model.named_modules())
    found = bottleneck_modules(parts, model, *home)
    assert [n for n in found if "head" not in n] == [expected.format(layer) for layer in (0, 1)]
    assert {widths(modules[n], modules[n.rpartition(".")[0]]) for n in found} == {size}
    if parallel:
        assert bottleneck_modules(parts, model, *home, placement="parallel") == found
    else:
        with pytest.raises(AdapterError, match="(?s)no module that takes the sub-layer's input.*allowed serial"):
            bottleneck_modules(parts, model, *home, placement="parallel")


def test_widths_of_stages_experts_and_fused_attention() -> None:
    swin, siglip, mixtral = small("swinv2"), small("siglip"), small("mixtral")
    for stage, width in ((0, 24), (1, 48)):  # a small MLP of its own, 2 -> 512, comes first in this attention
        block = swin.encoder.layers[stage].blocks[0]
        assert widths(block.attention, block) == (width, width)
    head = siglip.vision_model.head
    assert isinstance(head.attention, nn.MultiheadAttention) and widths(head.attention, head) == (48, 48)
    layer = mixtral.layers[0]
    assert not [m for m in layer.mlp.modules() if isinstance(m, nn.Linear)]
    assert widths(layer.mlp, layer) == (32, 32)


def test_a_target_without_linear_layers_is_refused() -> None:
    model = make("llava")
    with pytest.raises(AdapterError, match="'language.norm' holds no block for a bottleneck adapter"):
        bottleneck_modules(find_parts(model), model, "language", "norm")


def test_projectors_are_taken_as_one_module_or_by_the_layer_that_makes_the_output() -> None:
    """Qwen3-VL's merger is norm, fc1, fc2; Qwen3-Omni's keeps its layers in a list, which nobody calls; CLIP has two
    bare projections that are no pair."""
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
    vision |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": rope}
    qwen = transformers.AutoModel.from_config(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))
    found = [
        name
        for sub in dict.fromkeys(home[1] for home in find_parts(qwen).linear.values() if home[0] == "projector")
        for name in bottleneck_modules(find_parts(qwen), qwen, "projector", sub)
    ]
    assert sorted(found) == ["visual.deepstack_merger_list.0.linear_fc2", "visual.merger.linear_fc2"]
    model = clip()
    assert bottleneck_modules(find_parts(model), model, "projector", "other") == (
        "visual_projection",
        "text_projection",
    )
