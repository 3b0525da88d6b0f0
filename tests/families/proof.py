"""The proof of one family: built, parts, LoRA, one step, reload, merge, equal outputs. One `Row` of the table each."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mmft.adapters.build import Adapted, build_adapters, lora_layers, set_modes
from mmft.adapters.naming import names_as_given
from mmft.adapters.store import load_adapter, save_adapter
from mmft.adapters.targets import target_names
from mmft.backbones.fingerprint import fingerprint
from mmft.backbones.load import Backbone, load_backbone, model_class
from mmft.backbones.parts import count
from mmft.recipe.schema import AdapterSection, ModelSection
from tests.families.expected import expected
from tests.families.flow import media_names, other_picture, reads
from tests.families.tiny import Impossible, Tiny

STEPS = ("built", "parts", "lora", "step", "reload", "merge", "logits")
OK, CANNOT, SKIPPED = "ok", "cannot", "-"
CLOSE = 2e-4
"""Allowed difference, over the largest value, where the order of float32 sums differs: W x + B (A x) against
(W + B A) x, and convolutions in channels-last layout (as mmft loads them) against the plain layout."""
ELSEWHERE = 1e-5
"""Allowed difference, over the largest value, of the same weights at other addresses: loaded tensors begin where the
file has them, and a kernel adds in another order when they are not aligned."""
MOVED = 1e-4
"""An effect (of a picture, of an adapter) must be larger than this, over the largest value."""
LIMIT = 2_000_000
"""Weights that a tiny model may have."""


@dataclass(frozen=True)
class Row:
    """What the proof of one family gave: `ok`, `-` (not reached), `cannot`, or what went wrong, for each step."""

    family: str
    built: str = SKIPPED
    parts: str = SKIPPED
    lora: str = SKIPPED
    step: str = SKIPPED
    reload: str = SKIPPED
    merge: str = SKIPPED
    logits: str = SKIPPED
    seconds: float = 0.0
    note: str = ""

    @property
    def passed(self) -> bool:
        """True when every step was proved."""
        return all(getattr(self, step) == OK for step in STEPS)

    @property
    def possible(self) -> bool:
        """False for a family that upstream does not let run here; `note` says why."""
        return self.built != CANNOT

    @property
    def trouble(self) -> str:
        """The first step that went wrong and how, in one line."""
        return next((f"{s}: {getattr(self, s)}" for s in STEPS if getattr(self, s) not in (OK, SKIPPED, CANNOT)), "")


class Wrong(AssertionError):
    """A proof that did not hold."""


def prove(family: str, make: Callable[[], Tiny | Impossible], *, strict: bool = False) -> Row:
    """Run the whole proof of a family in a temporary folder. With `strict` the first failure is raised."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        proof = _Proof(family, make, Path(folder), strict=strict)
        proof.run()
    known = {field.name for field in fields(Row)}
    found = {step: text for step, text in proof.results.items() if step in known}
    return Row(family, **found, seconds=round(time.monotonic() - started, 1), note="; ".join(proof.notes))


class _Proof:
    """One family's models and folders while they are proved."""

    def __init__(
        self, family: str, make: Callable[[], Tiny | Impossible], folder: Path, *, strict: bool = False
    ) -> None:
        self.family, self.make, self.strict = family, make, strict
        self.base, self.adapter, self.merged = folder / "base", folder / "adapter", folder / "merged"
        self.results: dict[str, str] = {}
        self.notes: list[str] = []
        self.attention = "sdpa"
        self.tiny: Tiny
        self.cls: Any
        self.backbone: Backbone
        self.adapted: Adapted
        self.plain: torch.Tensor  # of the base, loaded as mmft loads it
        self.tuned: torch.Tensor  # with the adapter on it

    def run(self) -> None:
        """Every step; after a failure, those that need nothing of it."""
        needs = {"parts": "base", "lora": "backbone", "step": "adapted", "reload": "adapted"}
        for step in STEPS:
            have = {name for name in ("backbone", "adapted", "tuned") if hasattr(self, name)}
            have |= {"base"} if (self.base / "config.json").exists() else set()
            if step in needs and needs[step] not in have:
                continue
            if step == "merge" and not (self.adapter / "adapter_config.json").exists():
                continue
            if step == "logits" and not (self.merged / "config.json").exists():
                continue
            with self._recorded(step):
                getattr(self, f"_{step}")()
            if self.results.get("built") == CANNOT:
                return

    @contextmanager
    def _recorded(self, step: str) -> Iterator[None]:
        try:
            yield
            self.results.setdefault(step, OK)
        except Exception as error:
            if self.strict:
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
            named = isinstance(error, Wrong) or lines[0].startswith(type(error).__name__)
            kind = "" if named else f"{type(error).__name__}: "
            first = f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
            self.results[step] = f"{kind}{first}"[:400]

    def _built(self) -> None:
        made = self.make()
        if isinstance(made, Impossible):
            self.results["built"] = CANNOT
            self.notes.append(made.reason)
            return
        self.tiny = made
        self.notes += [made.note] if made.note else []
        self.cls = made.cls or model_class(made.config)
        model = self._random()
        size = sum(value.numel() for value in model.parameters())
        _demand(size <= LIMIT, f"{size:,} weights are not tiny")
        _demand(bool(media_names(made)) or expected(self.family).blind, "no picture or sound in the inputs")
        out = self._output(model)
        _demand(torch.equal(out, self._output(model)), "two runs give two outputs")
        if media_names(made):
            moved = _distance(out, self._output(model, picture=True))
            _demand(moved > MOVED, f"another picture does not change {made.output} ({moved:.1e})")
        model.save_pretrained(self.base)
        for name, content in (made.files or {}).items():
            (self.base / name).write_bytes(content)
        again = self._load(self.base)
        _demand(_equal_weights(model, again), "plain save_pretrained and from_pretrained change the weights")
        moved = _distance(out, self._output(again))
        _demand(moved <= ELSEWHERE, f"plain save_pretrained and from_pretrained change the output ({moved:.1e})")

    def _parts(self) -> None:
        self.backbone = self._backbone()
        model, parts = self.backbone.model, self.backbone.parts
        want = expected(self.family)
        missing = [part for part in want.parts if part not in parts.names]
        _demand(not missing, f"no {', '.join(missing)} among {', '.join(parts.names)}")
        odd = [part for part in want.without if part in parts.names]
        _demand(not odd, f"{', '.join(odd)} found where the class has none")
        counted = sum(row["parameters"] for row in count(model, parts).values())
        total = sum(value.numel() for value in model.parameters())
        _demand(counted == total, f"the parts hold {counted:,} weights, the model {total:,}")
        seen = reads(model, parts.linear, self.tiny)
        wrong = [text for name, found in seen.items() if (text := want.contradicts(name, parts.linear[name][0], found))]
        _demand(not wrong, f"{len(wrong)} layers in a wrong part: {', '.join(wrong[:3])}")

    def _lora(self) -> None:
        names = target_names(self.backbone.parts)
        targets = [*self.tiny.targets]
        if "projector" in names and "projector" not in targets:
            targets.append("projector")
        elif "projector" in self.backbone.parts.names and "projector" not in names:
            self.notes.append("projector has no layer that LoRA can sit on")
        section = AdapterSection(targets=tuple(targets), lora_rank=4, lora_alpha=8.0)
        self.plain = self._output(self.backbone.model)
        self.adapted = build_adapters(self.backbone, section, seed=0)
        fresh = self._output(self.adapted.model)
        _demand(torch.equal(fresh, self.plain), "a fresh adapter (B = 0) changes the output")

    def _step(self) -> None:
        model = self.adapted.model
        trained = self.adapted.trainable()
        before = {name: value.detach().clone() for name, value in model.state_dict().items()}
        set_modes(self.adapted)
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
        out = self._run(model, self.tiny.inputs)
        source = torch.Generator().manual_seed(5)
        (out * torch.randn(out.shape, generator=source)).sum().backward()
        optimizer.step()
        model.eval()
        after = model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        foreign = sorted(changed - trained.keys())
        _demand(not foreign, f"the step changed weights that are not trained: {', '.join(foreign[:3])}")
        by_part: dict[str, list[bool]] = {}
        for name, layer in lora_layers(model).items():
            key = f"base_model.model.{name}.lora_B.default.weight"
            _demand(key in before, f"{key} is not in the state dict")
            del layer
            by_part.setdefault(self.backbone.parts.part_of(name), []).append(key in changed)
        still = [part for part, moved in by_part.items() if not any(moved)]
        _demand(not still, f"the step changed no adapter weight in {', '.join(still)}")
        idle = {part: moved.count(False) for part, moved in by_part.items() if not all(moved)}
        self.notes += [f"{number} of {len(by_part[p])} layers of {p} got no gradient" for p, number in idle.items()]

    def _reload(self) -> None:
        source = torch.Generator().manual_seed(6)
        with torch.no_grad():  # an adapter of real size: one step moves the output by less than rounding does
            for name, value in self.adapted.trainable().items():
                value.copy_(torch.randn(value.shape, generator=source) * (0.1 if "lora_B" in name else 0.2))
        self.tuned = self._output(self.adapted.model)
        moved = _distance(self.plain, self.tuned)
        _demand(moved > MOVED, f"the adapter does not change the output ({moved:.1e})")
        prints = fingerprint(self.base)
        save_adapter(
            self.adapted, self.adapter, base_name=str(self.base), base_fingerprint=prints, recipe_digest="0" * 64
        )
        again = load_adapter(self._backbone(), self.adapter)
        _demand(torch.equal(self._output(again), self.tuned), "saved and loaded, the adapter gives another output")
        try:
            lost = self._lost()
            self.notes += [f"plain peft drops {lost} adapter tensors on loading"] if lost else []
        except (NotImplementedError, ValueError) as error:
            self.notes.append(f"plain peft cannot load the adapter ({str(error).splitlines()[0][:60]})")

    def _merge(self) -> None:
        from mmft.export.merge import merge_adapter

        made = merge_adapter(self.base, self.adapter, self.merged)
        oracle = self._oracle().state_dict()
        got = self._load(self.merged).state_dict()
        _demand(oracle.keys() == got.keys(), f"other tensors: {sorted(oracle.keys() ^ got.keys())[:3]}")
        wrong = [name for name in oracle if not torch.equal(oracle[name], got[name])]
        _demand(not wrong, f"{len(wrong)} tensors differ from merge_and_unload: {', '.join(wrong[:3])}")
        more = _keys(self.merged) ^ _keys(self.base)
        _demand(
            not more or bool(made.untied), f"the merged folder has other keys than the base folder: {sorted(more)[:3]}"
        )
        from mmft.export.verify import verify_merge

        report = verify_merge(self.base, self.adapter, self.merged)
        _demand(report.touched > 0, "verify_merge saw no touched tensor")

    def _logits(self) -> None:
        info, usual = self._loading(self.merged), self._loading(self.base)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            _demand(set(info[key]) == set(usual[key]), f"{key} on loading: {sorted(info[key])[:3]}")
        model = self._load(self.merged)
        out = self._output(model)
        merged = self._output(self._oracle())
        _demand(torch.equal(out, merged), f"merge_and_unload gives another output ({_distance(merged, out):.1e})")
        off = _distance(self.tuned, out)
        _demand(off < CLOSE, f"the merged folder is {off:.1e} from the adapter on its base")
        moved = _distance(self.plain, out)
        _demand(moved > MOVED, f"the merged folder gives the base's output ({moved:.1e})")
        if media_names(self.tiny):
            seen = _distance(out, self._output(model, picture=True))
            _demand(seen > MOVED, f"another picture does not change the merged model's output ({seen:.1e})")

    def _random(self) -> Any:
        """A model with every weight random: matrices too small to saturate, norms and biases near their start."""
        torch.manual_seed(0)
        try:
            model = self.cls._from_config(self.tiny.config, dtype=torch.float32, attn_implementation=self.attention)
        except (ValueError, ImportError) as error:
            if "attention" not in str(error).lower():
                raise
            self.attention = "eager"
            self.notes.append("eager attention only")
            model = self.cls._from_config(self.tiny.config, dtype=torch.float32, attn_implementation=self.attention)
        with torch.no_grad():
            for value in model.parameters():
                if value.ndim > 1:
                    inputs = value.shape[-1] if value.ndim == 3 else value[0].numel()
                    value.copy_(torch.randn(value.shape) * (0.5 / inputs**0.5 + 0.02))
                elif value.is_floating_point():
                    value.add_(torch.randn(value.shape) * 0.1)
            for table in model.modules():  # some families (chinese_clip) set the row of padding to zero at each load
                if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
                    table.weight[table.padding_idx] = 0.0
        return model.eval()

    def _backbone(self) -> Backbone:
        section = ModelSection(name_or_path=str(self.base), dtype="float32", attn_implementation=self.attention)
        return load_backbone(section, processor=False)

    def _load(self, folder: Path) -> Any:
        return self.cls.from_pretrained(folder, dtype=torch.float32, attn_implementation=self.attention).eval()

    def _loading(self, folder: Path) -> dict[str, Any]:
        """Keys that are missing from a folder or left over (not by the class itself: Omni's does not return them)."""
        load: Any = PreTrainedModel.from_pretrained
        _, info = load.__func__(self.cls, folder, dtype=torch.float32, output_loading_info=True)
        return info

    def _oracle(self) -> Any:
        """peft's own merge on a plainly loaded base, of the tensors that the saved file holds.

        They are put in by name: peft's own loader runs them through transformers' checkpoint renamings, and in some
        families drops those that it then does not find, with a warning.
        """
        config, base = LoraConfig.from_pretrained(str(self.adapter)), self._load(self.base)
        with names_as_given(base, config):
            plain = get_peft_model(base, config)
        saved = load_file(self.adapter / "adapter_model.safetensors")
        weights = dict(plain.named_parameters())
        with torch.no_grad():
            for name, value in saved.items():
                weights[_in_memory(name)].copy_(value)
        seen: set[int] = set()
        for layer in lora_layers(plain).values():  # one weight under two names, an adapter on each: two weights
            weight = layer.get_base_layer().weight
            if id(weight) in seen:
                layer.get_base_layer().weight = torch.nn.Parameter(weight.detach().clone())
            seen.add(id(weight))
        return plain.merge_and_unload().eval()

    def _lost(self) -> int:
        """Adapter tensors that `PeftModel.from_pretrained` does not put where they were."""
        plain = PeftModel.from_pretrained(self._load(self.base), str(self.adapter))
        weights = dict(plain.named_parameters())
        saved = load_file(self.adapter / "adapter_model.safetensors")
        return sum(
            1
            for name, value in saved.items()
            if (held := weights.get(_in_memory(name))) is None or not torch.equal(held, value)
        )

    def _output(self, model: Any, *, picture: bool = False) -> torch.Tensor:
        inputs = other_picture(self.tiny) if picture else self.tiny.inputs
        # Whether a weight asks for a gradient decides which matrix product torch takes, also under no_grad.
        asking = [value for value in model.parameters() if value.requires_grad]
        model.requires_grad_(False)
        with torch.no_grad():
            torch.manual_seed(0)  # some models draw noise in their forward pass
            found = self._run(model, inputs)
        for value in asking:
            value.requires_grad_(True)
        _demand(bool(torch.isfinite(found).all()), f"{self.tiny.output} is not finite")
        return found

    def _run(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.tiny.call:
            whole = model.get_base_model() if isinstance(model, PeftModel) else model
            return _field(whole.get_submodule(self.tiny.call)(**inputs), self.tiny.output)
        return _field(model(**inputs), self.tiny.output)


def _demand(holds: bool, text: str) -> None:
    if not holds:
        raise Wrong(text)


def _in_memory(name: str) -> str:
    """The name in a PeftModel of a tensor of a peft file."""
    return f"{name.removesuffix('.weight')}.default.weight"


def _field(output: Any, name: str) -> torch.Tensor:
    found = getattr(output, name)
    if not isinstance(found, torch.Tensor):
        raise Wrong(f"the output has no tensor {name}")
    return found


def _equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))


def _keys(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    return found
