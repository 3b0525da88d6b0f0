"""Checkpoints: whole or absent, found by verification, never deleted before a newer one verifies."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from mmft.engine.checkpoint import list_checkpoints, load_checkpoint, newest_valid, save_checkpoint
from mmft.engine.state import TrainState
from mmft.errors import CheckpointError

IDENTITY = {"recipe": "r"}


def made(step: int = 3) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    torch.manual_seed(step)
    params = {"b.weight": torch.nn.Parameter(torch.randn(4, 3)), "a.bias": torch.nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(params.values(), lr=0.1, fused=True)
    for _ in range(step):
        sum((p**2).sum() for p in params.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return params, optimizer


def save(root: Path, step: int, *, keep: int = 2, best: int | None = None) -> Path:
    params, optimizer = made(step)
    state = TrainState(step=step, samples_consumed=step * 4, best_step=best)
    return save_checkpoint(root, trainable=params, optimizer=optimizer, state=state, identity=IDENTITY, keep=keep)


def test_round_trip_is_exact_and_training_goes_on_the_same(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    params, optimizer = made(3)
    other, second = made(1)
    restored = load_checkpoint(folder, trainable=other, optimizer=second)
    assert restored.state == TrainState(step=3, samples_consumed=12)
    assert restored.identity == IDENTITY
    for now, then in ((params, optimizer), (other, second)):
        sum((p**2).sum() for p in now.values()).backward()
        then.step()
    for name, param in params.items():
        assert torch.equal(param, other[name])


def test_a_weight_that_never_had_a_gradient_has_no_moments_and_is_restored(tmp_path: Path) -> None:
    params, optimizer = made(2)
    params["idle"] = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [params["idle"]]})
    state = TrainState(step=2, samples_consumed=8)
    folder = save_checkpoint(tmp_path, trainable=params, optimizer=optimizer, state=state, identity=IDENTITY, keep=2)
    other, _ = made(1)
    other["idle"] = torch.nn.Parameter(torch.zeros(2))
    second = torch.optim.AdamW(other.values(), lr=0.1)
    load_checkpoint(folder, trainable=other, optimizer=second)
    assert torch.equal(other["idle"], params["idle"]) and other["idle"] not in second.state
    assert {name for name, value in other.items() if value in second.state} == {"a.bias", "b.weight"}
    del other["b.weight"], params["b.weight"]
    with pytest.raises(CheckpointError, match="unexpected"):
        load_checkpoint(folder, trainable=other, optimizer=second)


def test_no_pickle_and_modes_by_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 2)
    finally:
        os.umask(before)
    names = {path.name for path in folder.iterdir()}
    assert names == {"trainable.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_retention_keeps_newest_and_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2, best=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000003", "step-000001"]


def test_newest_broken_falls_back_with_a_warning_each(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    flip(tmp_path / "step-000003" / "trainable.safetensors")
    (tmp_path / "step-000002" / "state.json").unlink()
    warnings: list[str] = []
    assert newest_valid(tmp_path, warn=warnings.append) == tmp_path / "step-000001"
    assert [text.split(" ")[0] for text in warnings] == ["step-000003", "step-000002"]


def test_all_broken_is_an_error_and_nothing_is_deleted(tmp_path: Path) -> None:
    flip(save(tmp_path, 1) / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole") as caught:
        newest_valid(tmp_path, warn=lambda _: None)
    assert caught.value.exit_code == 4
    assert (tmp_path / "step-000001").is_dir()
    assert newest_valid(tmp_path / "nothing", warn=lambda _: None) is None


def test_a_broken_folder_is_not_counted_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    flip(save(tmp_path, 2, keep=2) / "trainable.safetensors")
    save(tmp_path, 3, keep=2)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert "step-000001" in names and "step-000003" in names


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    params, optimizer = made(1)
    params["c.weight"] = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"missing \['c.weight'\]"):
        load_checkpoint(folder, trainable=params, optimizer=optimizer)


def test_state_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    stored = json.loads((folder / "state.json").read_text())
    stored["state"]["future"] = 1
    (folder / "state.json").write_text(json.dumps(stored))
    params, optimizer = made(1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(folder, trainable=params, optimizer=optimizer)


def test_too_little_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmft.files.free_bytes", lambda path: 1000)
    with pytest.raises(CheckpointError, match="step 1"):
        save(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["file", "link", "lost link"])
def test_what_only_has_a_checkpoints_name_is_passed_over_and_replaced(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 1)
    place, other = tmp_path / "step-000002", tmp_path / "other"
    if kind == "file":
        place.write_text("no folder")
    else:
        place.symlink_to(other)
        if kind == "link":
            other.mkdir()
            (other / "mine").write_text("stays")
    assert newest_valid(tmp_path, warn=lambda _: None) == tmp_path / "step-000001"
    save(tmp_path, 2)
    assert newest_valid(tmp_path, warn=lambda _: None) == place and place.is_dir() and not place.is_symlink()
    assert kind != "link" or (other / "mine").read_text() == "stays"


def test_a_checkpoint_behind_a_link_is_read_and_only_the_link_is_deleted(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    save(root, 1)
    os.rename(root / "step-000001", tmp_path / "elsewhere")
    (root / "step-000001").symlink_to(tmp_path / "elsewhere")
    assert newest_valid(root, warn=lambda _: None) == root / "step-000001"
    save(root, 2)
    save(root, 3)
    assert [path.name for path in list_checkpoints(root)] == ["step-000003", "step-000002"]
    assert (tmp_path / "elsewhere" / "state.json").is_file()
