"""Combined adapters equal peft's `add_weighted_adapter`, load in peft, and merge; without the base being there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import mmft
from mmft.adapters.combine import REPORT, combine_adapters
from mmft.adapters.folder import CONFIG, SIDECAR, WEIGHTS
from mmft.adapters.mixing import METHODS, PRUNING, RANKED
from mmft.cli import app
from mmft.errors import AdapterError, RecipeError
from mmft.export.merge import merge_adapter
from mmft.seeds import fold
from tests.tiny import save_tiny_vlm, tiny_inputs

LANGUAGE = r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"
MIXED = (
    r"model\.language_model\.(embed_tokens|layers\.\d+\.self_attn\.(q_proj|v_proj))"
    r"|model\.vision_tower\.embeddings\.patch_embedding|model\.multi_modal_projector\.linear_1"
)
WEIGHTS_OF = (0.7, -0.4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("combine") / "base", "llava")


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one rank on linear layers, a table and a convolution."""
    folder = tmp_path_factory.mktemp("pair")
    return [adapter(base, folder / name, seed, target_modules=MIXED) for seed, name in enumerate("ab")]


@pytest.fixture(scope="module")
def odd(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters whose ranks, alphas, scalings and targets all differ."""
    folder = tmp_path_factory.mktemp("odd")
    first = {
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    }
    second = {"r": 2, "lora_alpha": 7, "target_modules": LANGUAGE + r"|model\.multi_modal_projector\.linear_2"}
    third = {"r": 1, "target_modules": r"model\.multi_modal_projector\.linear_\d"}
    values = (first, second, third)
    return [adapter(base, folder / str(number), number, **value) for number, value in enumerate(values)]


def load(base: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()


def adapter(base: Path, folder: Path, seed: int, **values: Any) -> Path:
    values = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, **values}
    model: Any = get_peft_model(load(base), LoraConfig(**values))
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.copy_(torch.randn(value.shape, generator=source) * 0.2)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def together(base: Path, folders: list[Path]) -> Any:
    """All of them in one peft model, by number."""
    model: Any = PeftModel.from_pretrained(load(base), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=str(number))
    return model.eval()


def deltas(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Module -> what an adapter adds to its weight, by peft."""
    return {
        key.removeprefix("base_model.model."): module.get_delta_weight(name).detach()
        for key, module in model.named_modules()
        if isinstance(module, LoraLayer) and (name in module.lora_A or name in module.lora_embedding_A)
    }


def opened(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(load(base), str(folder)).eval()


def factors(model: Any, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for key, module in model.named_modules():
        if isinstance(module, LoraLayer):
            table = name in module.lora_embedding_A
            a = module.lora_embedding_A[name] if table else module.lora_A[name].weight
            b = module.lora_embedding_B[name] if table else module.lora_B[name].weight
            found[key] = (a.detach(), b.detach())
    return found


def run(folders: list[Path], out: Path, method: str, **values: Any) -> Any:
    values = {"weights": WEIGHTS_OF, "density": 0.5 if method in PRUNING else None, **values}
    return combine_adapters(folders, out, method=method, **values)


# ---------------------------------------------------------------- against peft


@pytest.mark.parametrize("method", [name for name in METHODS if "dare" not in name])
def test_it_equals_add_weighted_adapter(base: Path, pair: list[Path], tmp_path: Path, method: str) -> None:
    run(pair, tmp_path / "out", method)
    model = together(base, pair)
    density = 0.5 if method in PRUNING else None
    model.add_weighted_adapter(["0", "1"], list(WEIGHTS_OF), "mix", combination_type=method, density=density)
    model.set_adapter("mix")
    found = opened(base, tmp_path / "out")
    assert len(deltas(found, "default")) == 7
    if method in RANKED:
        # The SVD's vectors are unique up to sign, and its two algorithms differ in the last bits: products to 1e-5.
        expected = deltas(model, "mix")
        for name, value in deltas(found, "default").items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    else:
        theirs = factors(model, "mix")
        for name, (a, b) in factors(found, "default").items():
            assert torch.equal(a, theirs[name][0]) and torch.equal(b, theirs[name][1]), name
    batch = tiny_inputs("llava")
    with torch.no_grad():
        torch.testing.assert_close(found(**batch).logits, model(**batch).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if "dare" in name])
def test_dare_equals_peft_with_the_same_seed_for_each_module(
    base: Path, pair: list[Path], tmp_path: Path, method: str
) -> None:
    run(pair, tmp_path / "out", method, seed=11)
    model, found = together(base, pair), opened(base, tmp_path / "out")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    checked = 0
    for name, (a, b) in factors(found, "default").items():
        short = name.removeprefix("base_model.model.")
        if method in RANKED and "embed_tokens" in name:
            continue  # peft prunes the transposed product there: the same draws fall on other values
        torch.manual_seed(fold(11, "dare", short))
        arguments = (["0", "1"], list(WEIGHTS_OF))
        if method in RANKED:
            target = layers[name]
            theirs = model.base_model._svd_generalized_task_arithmetic_weighted_adapter(
                method, *arguments, 4, target, target.lora_A["0"].weight, target.lora_B["0"].weight, 0.5, "total"
            )
            product, expected = b.flatten(1) @ a.flatten(1), theirs[1].flatten(1) @ theirs[0].flatten(1)
            torch.testing.assert_close(product, expected, rtol=0, atol=1e-5)  # two algorithms of one SVD
        else:
            theirs = model.base_model._generalized_task_arithmetic_weighted_adapter(
                method, *arguments, layers[name], 0.5, "total"
            )
            assert torch.equal(a, theirs[0]) and torch.equal(b, theirs[1]), name
        checked += 1
    assert checked >= 6
    run(pair, tmp_path / "again", method, seed=11)
    run(pair, tmp_path / "other", method, seed=12)
    weights = {name: (tmp_path / name / WEIGHTS).read_bytes() for name in ("out", "again", "other")}
    assert weights["out"] == weights["again"] != weights["other"]


def test_different_ranks_scalings_and_targets(base: Path, odd: list[Path], tmp_path: Path) -> None:
    """The plain sum of what peft says that each adapter adds, where it has the module."""
    shares = (0.5, 2.0, -1.0)
    model = together(base, odd)
    single = [deltas(model, str(number)) for number in range(3)]
    names = sorted(set().union(*single))
    assert [len(found) for found in single] == [4, 5, 2] and len(names) == 6
    total = {
        name: sum(share * found[name].double() for share, found in zip(shares, single, strict=True) if name in found)
        for name in names
    }
    for method, values in (("cat", {}), ("svd", {"rank": 64}), ("svd", {"rank": 1})):
        out = tmp_path / f"{method}{values.get('rank', '')}"
        report = run(odd, out, method, weights=shares, **values)
        found = deltas(opened(base, out), "default")
        assert sorted(found) == names
        lost = math.sqrt(sum(float((found[n].double() - total[n]).square().sum()) for n in names))
        whole = math.sqrt(sum(float(total[n].square().sum()) for n in names))
        if values.get("rank") == 1:  # Eckart and Young: what is lost are the other singular values
            rest = sum(float(torch.linalg.svdvals(total[n])[1:].square().sum()) for n in names)
            assert lost == pytest.approx(math.sqrt(rest), rel=1e-5)
            assert report.difference == pytest.approx(lost / whole, rel=1e-5)
        else:
            assert lost / whole < 1e-6 and report.difference == 0.0
    written = json.loads((tmp_path / "cat" / CONFIG).read_text())
    assert not written["use_rslora"] and written["lora_alpha"] == written["r"]
    assert written["rank_pattern"] == written["alpha_pattern"] != {}
    assert written["target_modules"] == names


def test_ties_against_the_paper(base: Path, odd: list[Path], tmp_path: Path) -> None:
    """Trim, elect, merge on whole deltas, written out; and the share of conflicts, counted."""
    folders, shares, density = odd[:2], (1.0, 1.0), 0.3
    report = run(folders, tmp_path / "out", "ties_svd", weights=shares, density=density, rank=64)
    model = together(base, folders)
    single = [deltas(model, "0"), deltas(model, "1")]
    found = deltas(opened(base, tmp_path / "out"), "default")
    conflicts = twice = 0
    for name, value in found.items():
        trimmed = []
        for item in (found[name] for found in single if name in found):
            cut = item.abs().flatten().sort(descending=True).values[int(density * item.numel()) - 1]
            trimmed.append(torch.where(item.abs() >= cut, item, 0.0))
        sign = sum(trimmed).sign()  # type: ignore[union-attr]
        kept = [torch.where(item.sign() == sign, item, 0.0) for item in trimmed]
        count = sum((item != 0).int() for item in kept).clamp(min=1)  # type: ignore[union-attr]
        torch.testing.assert_close(value, sum(kept) / count, rtol=0, atol=2e-5)  # through one SVD in float32
        if len(trimmed) == 2:
            both = (trimmed[0] != 0) & (trimmed[1] != 0)
            twice += int(both.sum())
            conflicts += int((both & (trimmed[0].sign() != trimmed[1].sign())).sum())
    assert twice > 100 and report.sign_conflicts == conflicts / twice


def test_the_report_says_how_large_and_how_alike(base: Path, pair: list[Path], tmp_path: Path) -> None:
    report = run(pair, tmp_path / "out", "linear")
    model = together(base, pair)
    first, second = deltas(model, "0"), deltas(model, "1")
    mixed = deltas(opened(base, tmp_path / "out"), "default")

    def dot(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
        return sum(float((x[n].double() * y[n].double()).sum()) for n in x)

    total = {n: WEIGHTS_OF[0] * first[n] + WEIGHTS_OF[1] * second[n] for n in first}
    gap = {n: mixed[n] - total[n] for n in first}
    norms = [math.sqrt(dot(x, x)) for x in (first, second)]
    assert [source.norm for source in report.adapters] == pytest.approx(norms, rel=1e-5)
    assert report.cosine[0][1] == pytest.approx(dot(first, second) / (norms[0] * norms[1]), abs=1e-6)
    assert report.cosine[1][1] == pytest.approx(1.0)
    assert report.norm == pytest.approx(math.sqrt(dot(mixed, mixed)), rel=1e-5)
    assert report.difference == pytest.approx(math.sqrt(dot(gap, gap) / dot(total, total)), rel=1e-4)
    assert report.difference > 0.1  # peft's `linear` is not the weighted sum
    assert report.sign_conflicts is None and report.rank == 4 and report.modules == 7
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report.to_json()


def test_the_result_merges_and_outputs_are_equal(base: Path, odd: list[Path], tmp_path: Path) -> None:
    run(odd, tmp_path / "out", "cat", weights=(0.5, 2.0, -1.0))
    merge_adapter(base, tmp_path / "out", tmp_path / "merged")
    model = opened(base, tmp_path / "out")
    batch = tiny_inputs("llava")
    with torch.no_grad():
        live = model(**batch).logits
        merged = load(tmp_path / "merged")(**batch).logits
        state = model.merge_and_unload().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in load(tmp_path / "merged").state_dict().items())
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-4)  # W x + B A x against (W + B A) x in fp32


def test_whole_modules_of_one_adapter_come_along(base: Path, pair: list[Path], tmp_path: Path) -> None:
    saved = {"modules_to_save": ["multi_modal_projector.linear_2"]}
    whole = [adapter(base, tmp_path / str(seed), seed, **saved) for seed in (5, 6)]
    report = run([pair[0], whole[0]], tmp_path / "out", "cat")
    assert len(report.kept) == 2
    ours, theirs = load_file(tmp_path / "out" / WEIGHTS), load_file(whole[0] / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in report.kept)
    model = opened(base, tmp_path / "out")
    found = model.base_model.model.model.multi_modal_projector.linear_2.modules_to_save["default"].weight
    assert torch.equal(found, theirs[next(name for name in report.kept if name.endswith("weight"))])
    with pytest.raises(AdapterError, match="linear_2.bias was trained whole in 5 and in 6, with different values"):
        run(whole, tmp_path / "no", "cat")
    assert not (tmp_path / "no").exists()


def test_one_adapter_can_be_scaled_and_shrunk(base: Path, pair: list[Path], tmp_path: Path) -> None:
    run(pair[:1], tmp_path / "out", "svd", weights=(2.0,), rank=4)
    expected = deltas(together(base, pair[:1]), "0")
    for name, value in deltas(opened(base, tmp_path / "out"), "default").items():
        torch.testing.assert_close(value, 2.0 * expected[name], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the verb


def test_the_verb_and_its_json(pair: list[Path], tmp_path: Path) -> None:
    words = ["combine", *map(str, pair), "--weights", "0.7,0.3", "--method", "ties", "--density", "0.5"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "text")])
    assert done.exit_code == 0, done.output
    assert "ties of 2 adapters" in done.stdout and "values with opposite signs: " in done.stdout
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "json"), "--json"])
    values = json.loads(done.stdout)
    assert [found["weight"] for found in values["adapters"]] == [0.7, 0.3] and values["rank"] == 4
    again = mmft.combine(pair, tmp_path / "function", weights=[0.7, 0.3], method="ties", density=0.5)
    assert {**again, "folder": ""} == {**values, "folder": ""}
    assert (tmp_path / "function" / WEIGHTS).read_bytes() == (tmp_path / "json" / WEIGHTS).read_bytes()
    equal = mmft.combine(pair, tmp_path / "equal")
    assert equal["method"] == "cat" and [found["weight"] for found in equal["adapters"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"method": "tise"}, "(?s)method 'tise' is unknown.*nearest: 'ties'"),
        ({"method": "ties"}, "(?s)ties needs the share of values it keeps, density is None.*--density 0.5"),
        ({"method": "ties", "density": 1.5}, "density is 1.5"),
        ({"method": "cat", "density": 0.5}, "cat keeps all values and takes no density"),
        ({"method": "cat", "rank": 3}, "(?s)method cat takes no rank 3.*svd"),
        ({"weights": "0.5"}, r"1 weights \(0.5\) for 2 adapters"),
        ({"weights": "0.5,x"}, "weights '0.5,x' are not numbers"),
        ({"weights": [0.0, 0.0]}, "not all of them zero"),
        ({"weights": [math.inf, 1.0]}, "one finite number for each adapter"),
    ],
)
def test_bad_choices(pair: list[Path], tmp_path: Path, values: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        mmft.combine(pair, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what is refused


def copy(folder: Path, target: Path, *, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    target.mkdir()
    raw = json.loads((folder / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**raw, **config}))
    save_file({**load_file(folder / WEIGHTS), **(tensors or {})}, target / WEIGHTS, metadata={"format": "pt"})
    return target


def sidecar(folder: Path, base_print: str) -> Path:
    values = {"format": 1, "method": "lora", "base_name": "b", "base_fingerprint": {"config.json": base_print}}
    values |= {"recipe_digest": "r", "targets": [["language", "attention", "lora"]]}
    (folder / SIDECAR).write_text(json.dumps(values))
    return folder


def test_other_bases_are_refused(pair: list[Path], tmp_path: Path) -> None:
    renamed = copy(pair[1], tmp_path / "renamed", base_model_name_or_path="another/model")
    with pytest.raises(AdapterError, match=r"(?s)2 different bases: a: base .*; renamed: base another/model"):
        run([pair[0], renamed], tmp_path / "out", "cat")
    first, second = (sidecar(copy(pair[n], tmp_path / str(n)), str(n)) for n in (0, 1))
    with pytest.raises(AdapterError, match="2 different bases: 0: digest"):
        run([first, second], tmp_path / "out", "cat")
    sidecar(second, "0")
    moved = json.loads((second / SIDECAR).read_text())
    (second / SIDECAR).write_text(json.dumps({**moved, "base_name": "the same files elsewhere"}))
    run([first, second], tmp_path / "out", "cat")
    written = json.loads((tmp_path / "out" / SIDECAR).read_text())
    assert written["base_fingerprint"] == {"config.json": "0"} and written["recipe_digest"] == "r"
    assert written["targets"] == [["language", "attention", "lora"]] and written["combined"]["method"] == "cat"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "IA3"}, "(?s)adapter of type IA3 cannot be combined.*LORA"),
        ({"use_dora": True}, "not plain LoRA and cannot be combined: use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"something_new": 3}, "something_new is 3"),
        ({"r": 5}, "the tensors have rank 4, adapter_config.json says 5"),
    ],
)
def test_other_methods_are_refused(pair: list[Path], tmp_path: Path, config: dict[str, Any], text: str) -> None:
    with pytest.raises(AdapterError, match=text):
        run([pair[0], copy(pair[1], tmp_path / "bad", **config)], tmp_path / "out", "cat")


def test_ranks_that_a_method_cannot_add(odd: list[Path], tmp_path: Path) -> None:
    for method, remedy in (("linear", "svd"), ("ties", "ties_svd"), ("dare_linear", "dare_linear_svd")):
        with pytest.raises(AdapterError, match=f"(?s)q_proj has ranks 2, 4: method {method} .*--method {remedy}"):
            run(odd[:2], tmp_path / "out", method)


def test_damaged_folders_are_refused_and_nothing_is_left(pair: list[Path], tmp_path: Path) -> None:
    key = next(name for name in load_file(pair[1] / WEIGHTS) if name.endswith("q_proj.lora_A.weight"))
    bad = copy(pair[1], tmp_path / "bad", tensors={key: torch.full((4, 64), math.nan)})
    with pytest.raises(AdapterError, match="q_proj.lora_A.weight holds NaN or infinity"):
        run([pair[0], bad], tmp_path / "out", "cat")
    wide = copy(pair[1], tmp_path / "wide", tensors={key: torch.ones(4, 65)})
    with pytest.raises(AdapterError, match="q_proj has different shapes in the adapters"):
        run([pair[0], wide], tmp_path / "out", "cat")
    lone = copy(pair[1], tmp_path / "lone", tensors={key.replace("q_proj", "k_proj"): torch.ones(4, 64)})
    with pytest.raises(AdapterError, match="the factors of .*k_proj do not belong together"):
        run([pair[0], lone], tmp_path / "out", "cat")
    strange = copy(pair[1], tmp_path / "strange", tensors={key.replace("lora_A", "lora_E"): torch.ones(4)})
    with pytest.raises(AdapterError, match="it holds .*lora_E.weight"):
        run([pair[0], strange], tmp_path / "out", "cat")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "trained_weights.safetensors").touch()
    with pytest.raises(AdapterError, match="holds no adapter_config.json: method full has trained weights"):
        run([pair[0], tmp_path / "full"], tmp_path / "out", "cat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "full", "lone", "strange", "wide"]
    run(pair, tmp_path / "out", "cat")
    with pytest.raises(AdapterError, match="out exists already"):
        run(pair, tmp_path / "out", "cat")
