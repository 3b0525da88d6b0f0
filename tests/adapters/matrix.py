"""Adapter methods x families: each cell trains, saves, loads (here and in plain peft) and merges, or says why not.

    python tests/adapters/matrix.py [METHOD ...]        one table; `make test-methods`

A cell is `ok` (merged too), `ok, no merge` with the reason below the table, or `-` with the reason of the refusal.
"""

from __future__ import annotations

import copy
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import logging

from mmft.adapters.build import Adapted, build_adapters, set_modes
from mmft.adapters.store import TRAINED, load_adapter, save_adapter
from mmft.backbones.classes import model_class
from mmft.backbones.load import Backbone
from mmft.backbones.parts import find_parts
from mmft.engine.optim import build_optimizer
from mmft.errors import AdapterError, ExportError
from mmft.export.merge import merge_adapter
from mmft.recipe.methods import METHODS
from mmft.recipe.schema import AdapterSection, TrainSection
from tests.families.tiny import Impossible, Tiny

FAMILIES = ("llava", "qwen2_5_vl", "mllama", "blip-2", "smolvlm", "clip", "florence2")
STARTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "lora+": {"loraplus_lr_ratio": 16.0},
}
"""Rows of LoRA beside its plain one; LoftQ needs a quantized base and is tested with one."""
ROWS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in METHODS},
    **{name: {"method": "lora", **values} for name, values in STARTS.items()},
    "parallel": {"method": "bottleneck", "bottleneck_placement": "parallel"},
}
STEPS = 4


@dataclass(frozen=True)
class Cell:
    """What came of one method on one family."""

    word: str
    reason: str = ""


@cache
def kind(family: str) -> Tiny | Impossible:
    """The tiny config and inputs of a family."""
    for path in sorted((Path(__file__).parents[1] / "families").glob("kinds_*.py")):
        kinds = importlib.import_module(f"tests.families.{path.stem}").KINDS
        if family in kinds:
            return kinds[family]()
    return Impossible("no tiny config")


def backbone(family: str, dtype: torch.dtype = torch.float32) -> Backbone:
    """A tiny model of the family; equal at every call."""
    tiny = kind(family)
    assert isinstance(tiny, Tiny)
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.config)
    model = (tiny.cls or model_class(config))(config).to(dtype).eval()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:  # biases and norms that are all zero and one hide mistakes
                value.add_(0.1 * torch.randn(value.shape, generator=source).to(dtype))
            assert torch.isfinite(value).all(), name
    return Backbone(model, None, find_parts(model), None, family, None, False)


def section(row: str, base: Backbone) -> AdapterSection:
    """The row's recipe with targets that this model has."""
    values = {"lora_rank": 4, "lora_alpha": 8.0, "oft_block_size": 8, "num_virtual_tokens": 3, "bottleneck_size": 8}
    values |= ROWS[row]
    place = METHODS[values["method"]].place
    names = base.parts.names
    if place == "norms":
        values["targets"] = [part for part in ("language", "vision") if part in names]
    elif place == "biases":
        values["targets"] = [part for part in ("vision", "projector", "language") if part in names]
    elif place != "prompt":
        able = [f"language.{sub}" for sub in ("attention", "mlp") if base.parts.linears("language", sub)]
        bridge = base.parts.linears("projector") and place != "blocks" and row != "eva"  # CLIP's sees two rows only
        values["targets"] = [*able, "projector"] if bridge else able
    return AdapterSection.model_validate(values)


def outputs(model: Any, family: str) -> torch.Tensor:
    """The compared output on the family's inputs."""
    tiny = kind(family)
    assert isinstance(tiny, Tiny)
    found = getattr(model(**tiny.inputs), tiny.output)
    return found.float()


def train(adapted: Adapted, family: str) -> list[float]:
    """A few steps towards a constant; the losses. Asserts that only what is trained changes, and stays finite."""
    params = adapted.trainable()
    assert params
    frozen = {n: v.detach().clone() for n, v in adapted.model.state_dict().items() if n not in params}
    before = {name: value.detach().clone() for name, value in params.items()}
    rate = 1e-4 if adapted.method == "full" else 1e-3
    optimizer = build_optimizer(adapted, TrainSection(learning_rate=rate), params, total_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        set_modes(adapted)
        optimizer.zero_grad()
        loss = (outputs(adapted.model, family) - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    adapted.model.eval()
    after = adapted.model.state_dict()
    moved = [name for name in frozen if not torch.equal(frozen[name], after[name])]
    assert not [name for name in moved if "ranknum" not in name], moved[:3]
    assert all(torch.isfinite(value).all() for value in params.values())
    assert any(not torch.equal(before[name], value) for name, value in params.items()), "nothing was trained"
    return losses


def same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Equal to rounding: a start that is saved at twice the rank is summed in another order."""
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    assert gap < 1e-4, f"{what}: outputs differ by {gap:.1e}"


def plain_load(family: str, folder: Path) -> Any:
    """The adapter as a user without mmft's loader has it."""
    from peft import PeftModel
    from safetensors.torch import load_file

    model = backbone(family).model
    if (folder / TRAINED).exists():
        missing = model.load_state_dict(load_file(folder / TRAINED), strict=False)
        assert not missing.unexpected_keys
        return model
    return PeftModel.from_pretrained(model, str(folder)).eval()


def merged(family: str, folder: Path, root: Path) -> str:
    """Streaming merge against peft's own, tensor by tensor; the reason when it is refused."""
    base, out = root / "base", root / "merged"
    if not base.exists():
        backbone(family).model.save_pretrained(base)
    try:
        merge_adapter(base, folder, out)
    except (ExportError, AdapterError) as error:
        return error.problems[0].what
    model = plain_load(family, folder)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(root / "plain")
    found, wanted = read(out), read(root / "plain")
    assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:4]
    for name, value in wanted.items():
        gap = (found[name].float() - value.float()).abs().max()
        assert gap <= 1e-5 * max(1.0, float(value.float().abs().max())), f"merged {name} differs by {gap:.1e}"
    return ""


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def cell(row: str, family: str, *, merge: bool = True) -> Cell:
    """One method on one family, from build to merge."""
    tiny = kind(family)
    if isinstance(tiny, Impossible):
        return Cell("-", tiny.reason)
    base = backbone(family)
    batches = [dict(tiny.inputs)] if row == "eva" else None
    try:
        adapted = build_adapters(base, section(row, base), seed=0, calibration=batches)
    except AdapterError as error:
        return Cell("-", error.problems[0].what)
    losses = train(adapted, family)
    assert min(losses[1:]) < losses[0], f"loss does not fall: {losses}"
    with torch.no_grad():
        wanted = outputs(adapted.model, family)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name) / "adapter"
        save_adapter(adapted, folder, base_name=family, base_fingerprint={}, recipe_digest="")
        same(outputs(load_adapter(backbone(family), folder), family), wanted, "loaded by mmft")
        same(outputs(plain_load(family, folder), family), wanted, "loaded by peft")
        if row == "full":
            return Cell("ok", "the trained weights are the model; export/full.py writes it")
        reason = merged(family, folder, Path(name)) if merge else ""
    return Cell("ok, no merge" if reason else "ok", reason)


def main(rows: list[str], say: Callable[[str], Any]) -> int:
    """Run and print the table; the number of cells that failed."""
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    notes: list[str] = []
    failed = 0
    say(f"{'':14s} " + " ".join(f"{family:>12s}" for family in FAMILIES))
    for row in rows or list(ROWS):
        words = []
        for family in FAMILIES:
            try:
                found = cell(row, family)
            except Exception as error:  # a cell that fails in whatever way is a row of the table, not its end
                found, failed = Cell("FAILED", f"{type(error).__name__}: {str(error).splitlines()[:1]}"), failed + 1
            words.append(found.word)
            if found.reason:
                notes.append(f"{row} x {family}: {found.reason}")
        say(f"{row:14s} " + " ".join(f"{word:>12s}" for word in words))
    say("\n" + "\n".join(notes))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], lambda text: print(text, flush=True)))
