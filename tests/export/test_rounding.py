"""Changes below the spacing of 16-bit types: right merges hold little of them, and are right all the same."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmft.errors import ExportError
from mmft.export.merge import merge_adapter
from mmft.export.rounding import Tally
from mmft.export.verify import verify_merge
from mmft.files import write_manifest
from tests.export import zoo
from tests.export.test_any_tool import merged_by_peft

torch.set_num_threads(1)
HALVES = [torch.bfloat16, torch.float16]
SCALES = [3e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0]  # of W; bfloat16 rounds at 2e-3 to 4e-3, float16 at an eighth of that


def pair(seed: int, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A stored weight and a change, float64; the weights differ in size by far more than one binade."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(64, 256, generator=generator) * 0.02).to(dtype).double()
    return weight, torch.randn(64, 256, generator=generator).double() * 0.02 * scale


def tally(got: torch.Tensor, weight: torch.Tensor, change: torch.Tensor, dtype: torch.dtype, *, own: bool) -> Tally:
    found = Tally(dtype, own)
    slack = 2.0**-24 * (weight.abs() + 4 * change.abs())  # as a float32 sum has it
    for rows in (slice(0, 24), slice(24, 64)):
        found.add(got[rows], weight[rows] + change[rows], weight=weight[rows], slack=slack[rows])
    return found


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", SCALES)
def test_right_at_every_size(scale: float, dtype: torch.dtype, own: bool) -> None:
    for seed in range(20):
        weight, change = pair(seed, dtype, scale)
        merged = (weight.float() + change.float()).to(dtype)  # what a streamed merge does
        assert tally(merged.double(), weight, change, dtype, own=own).right
        if not own:  # the change rounded as well, as a merge in 16 bits does
            merged = weight.to(dtype) + change.to(dtype)
            assert tally(merged.double(), weight, change, dtype, own=own).right


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", SCALES)
def test_forgotten_is_found_as_soon_as_it_shows(scale: float, dtype: torch.dtype, own: bool) -> None:
    shown = 0
    for seed in range(20):
        weight, change = pair(seed, dtype, scale)
        right = (weight + change).to(dtype).double()
        found = tally(weight, weight, change, dtype, own=own)
        count = int((right != weight).sum())
        # Another tool, that rounds the change as well, may get a few values otherwise; float16 has nothing below 6e-8.
        if own or count == 0 or (count >= 8 and scale >= 1e-4):
            assert found.right == (count == 0), (seed, count)
        shown += not found.right
        if not found.right and scale >= 1e-4:
            assert "not in it" in found.diagnosis
    if scale >= 1e-3 or scale == 0:
        assert shown == (20 if scale else 0)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", SCALES[:3])
@pytest.mark.parametrize("times", [2.0, 1.5, 0.5, -1.0])
def test_wrong_scalings_are_found(times: float, scale: float, dtype: torch.dtype, own: bool) -> None:
    for seed in range(20):
        weight, change = pair(seed, dtype, scale)
        merged = (weight + times * change).to(dtype).double()
        found = tally(merged, weight, change, dtype, own=own)
        assert not found.right and "not in it (" not in found.diagnosis
        if times == 2.0 and scale == SCALES[0]:
            assert "in it twice" in found.diagnosis


def test_a_base_that_was_rounded_before_the_merge() -> None:
    """float32 on disk, merged in bfloat16 by another tool: the change may drown in the rounding of W."""
    for scale in SCALES:
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).double() * 0.02
        change = pair(2, torch.bfloat16, scale)[1]
        merged = (weight.to(torch.bfloat16) + change.to(torch.bfloat16)).double()
        assert tally(merged, weight, change, torch.bfloat16, own=False).right


def _tiny_adapter(base: Path, folder: Path, alpha: float) -> Path:
    return zoo.adapt(base, folder, target_modules=["q_proj", "down_proj"], lora_alpha=alpha)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alpha", [0.2, 0.02, 2e-3, 1e-9])
def test_folders_with_a_faint_adapter(alpha: float, dtype: torch.dtype, tmp_path: Path) -> None:
    """mmft's folder and peft's are right; the base's weights in their place are wrong unless nothing shows."""
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=dtype)
    adapter = _tiny_adapter(base, tmp_path / "adapter", alpha)
    merge_adapter(base, adapter, tmp_path / "own")
    report = verify_merge(base, adapter, tmp_path / "own")
    assert report.touched == 6 and report.worst <= 1
    merged_by_peft(base, adapter, tmp_path / "peft")
    assert verify_merge(base, adapter, tmp_path / "peft").touched == 6
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "own"))
    shows = [key for key in after if not torch.equal(before[key], after[key])]
    assert len(shows) == 6 or alpha < 0.02
    for name in ("own", "peft"):
        shutil.copyfile(tmp_path / "base/model.safetensors", tmp_path / name / "model.safetensors")
    write_manifest(tmp_path / "own")
    for name in ("own", "peft"):
        if not shows:
            verify_merge(base, adapter, tmp_path / name)
            continue
        with pytest.raises(ExportError, match="the adapter is not in it") as caught:
            verify_merge(base, adapter, tmp_path / name)
        assert all(key in str(caught.value) for key in shows)


def test_one_bit_in_a_16_bit_merge_is_found(tmp_path: Path) -> None:
    base = zoo.save_tiny(tmp_path / "base", "llava", dtype=torch.bfloat16)
    adapter = _tiny_adapter(base, tmp_path / "adapter", 8)
    merge_adapter(base, adapter, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged/model.safetensors")
    key = next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.weight"))
    tensors[key].view(torch.int16).view(-1)[9] += 1  # the next value of the type
    save_file(tensors, tmp_path / "merged/model.safetensors", metadata={"format": "pt"})
    write_manifest(tmp_path / "merged")
    with pytest.raises(ExportError, match="is not W") as caught:
        verify_merge(base, adapter, tmp_path / "merged")
    assert key in str(caught.value)
