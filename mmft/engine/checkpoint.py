"""Checkpoints: complete or absent, no pickle, no base weights.

`step-000120/` holds `trainable.safetensors` (fp32 weights that training changes), `optimizer.safetensors`,
`state.json` and, written last, `MANIFEST.json` with the sha256 of each. Discovery verifies; retention deletes only
after the newer folder verified. Random states are not stored: every draw is a function of (seed, step).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmft.engine.state import TrainState
from mmft.errors import CheckpointError
from mmft.files import atomic_folder, require_free, verify_folder, write_json
from mmft.headers import header_problem

_SPARE = 2.2
"""Free space that is asked for, in checkpoints: the new one beside the old one."""
FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Restored:
    """A checkpoint that was found, verified and loaded."""

    folder: Path
    state: TrainState
    identity: dict[str, Any]


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands."""
    return root / f"step-{step:06d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders by step, newest first; never by time, clocks are set back."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, torch.Tensor]:
    """`NAME.KEY` → tensor of AdamW's state; `names` maps id(parameter) to its name."""
    tensors: dict[str, torch.Tensor] = {}
    for param, values in optimizer.state.items():
        for key, value in values.items():
            tensors[f"{names[id(param)]}.{key}"] = value.detach().cpu().contiguous()
    return tensors


def require_room(root: Path, trainable: dict[str, torch.nn.Parameter]) -> None:
    """Raise CheckpointError before a run starts when the disk cannot take two checkpoints (2.2 times one: the weights
    and AdamW's two moments in fp32)."""
    one = sum(param.numel() * (param.element_size() + 8) for param in trainable.values())
    require_free(root, int(_SPARE * one) + 65536, what=f"the run's checkpoints ({one:,} bytes each)")


def save_checkpoint(
    root: Path,
    *,
    trainable: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    identity: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/step-NNNNNN`, verify it, then delete all but the newest `keep` (and the best one).

    Raises CheckpointError when the disk has less than 2.2 times the needed bytes free, or the write fails.
    """
    weights = {name: param.detach().cpu().contiguous() for name, param in trainable.items()}
    moments = optimizer_tensors(optimizer, {id(param): name for name, param in trainable.items()})
    needed = sum(t.numel() * t.element_size() for t in (*weights.values(), *moments.values()))
    root.mkdir(parents=True, exist_ok=True)
    require_free(root, int(_SPARE * needed) + 65536, what=f"the checkpoint of step {state.step}")
    final = checkpoint_folder(root, state.step)
    try:
        if os.path.lexists(final):
            # The same step was saved before (a resumed run repeats it): the old folder stays if it is whole.
            if _is_valid(final):
                return final
            _remove(final)
        with atomic_folder(final, needed=needed) as folder:
            save_file(weights, folder / "trainable.safetensors")
            save_file(moments, folder / "optimizer.safetensors")
            write_json(folder / "state.json", {"state": state.to_json(), "identity": identity})
        verify_folder(final)
        _retain(root, keep=keep, best=state.best_step)
    except (OSError, SafetensorError) as error:  # an error of the disk that is not "full"
        raise CheckpointError(
            f"the checkpoint of step {state.step} cannot be written: {error}",
            where=str(root),
            do="look after the disk (its log, its rights), then go on with --resume; what was whole is whole",
        ) from error
    return final


def _is_valid(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except CheckpointError:
        return False
    return True


def _retain(root: Path, *, keep: int, best: int | None) -> None:
    valid = [folder for folder in list_checkpoints(root) if _is_valid(folder)]
    spare = set(valid[: max(keep, 1)])
    if best is not None:
        spare.add(checkpoint_folder(root, best))
    for folder in valid:
        if folder not in spare:
            _remove(folder)


def _remove(path: Path) -> None:
    """A folder with all in it; of a link only the link, and a file that has a checkpoint's name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def newest_valid(root: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; each newer broken one is named through `warn`.

    Raises CheckpointError when checkpoints exist and none verifies (nothing is overwritten then).
    """
    broken: list[str] = []
    for folder in list_checkpoints(root):
        try:
            verify_folder(folder)
        except CheckpointError as error:
            warn(f"{folder.name} is damaged and passed over: {error.problems[0].what}")
            broken.append(folder.name)
            continue
        return folder
    if broken:
        raise CheckpointError(
            f"none of {len(broken)} checkpoints is whole ({', '.join(broken)})",
            where=str(root),
            do="restore one from a backup, or start again with --overwrite",
        )
    return None


def load_checkpoint(
    folder: Path, *, trainable: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer | None
) -> Restored:
    """Copy a verified checkpoint's tensors into the parameters and the optimizer; every tensor must have a home."""
    try:
        for name in ("trainable.safetensors", "optimizer.safetensors"):
            if problem := header_problem(folder / name):
                raise ValueError(f"{name}: {problem}")
        stored = json.loads((folder / "state.json").read_text())
        weights = load_file(folder / "trainable.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        state = TrainState.from_json(stored["state"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", where=str(folder), do="delete the folder: an older checkpoint is used then"
        ) from error
    _check_names(set(weights), set(trainable), folder)
    with torch.no_grad():
        for name, param in trainable.items():
            param.copy_(weights[name])
    if optimizer is not None:
        _restore_moments(optimizer, moments, trainable, folder)
    return Restored(folder=folder, state=state, identity=stored["identity"])


def _check_names(stored: set[str], wanted: set[str], folder: Path) -> None:
    if stored == wanted:
        return
    missing, extra = sorted(wanted - stored)[:5], sorted(stored - wanted)[:5]
    raise CheckpointError(
        f"holds other tensors than the recipe trains (missing {missing}, unexpected {extra})",
        where=str(folder),
        do="resume with the recipe the run was started with",
    )


def _restore_moments(
    optimizer: torch.optim.Optimizer,
    moments: dict[str, torch.Tensor],
    trainable: dict[str, torch.nn.Parameter],
    folder: Path,
) -> None:
    owners: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in moments.items():
        name, _, kind = key.rpartition(".")
        owners.setdefault(name, {})[kind] = tensor
    _check_names(set(owners), set(owners) & set(trainable), folder)  # a weight without a gradient has no moments yet
    for name, values in owners.items():
        param = trainable[name]
        optimizer.state[param] = {
            # AdamW keeps its step count where the parameter is only for fused kernels; it stays a float32 scalar.
            kind: value.to(param.device) if kind != "step" or param.is_cuda else value
            for kind, value in values.items()
        }
