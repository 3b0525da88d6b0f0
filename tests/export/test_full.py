"""A fully trained model's folder: cast, tied weights once, loads in plain transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmft.errors import CheckpointError
from mmft.export.full import save_full
from mmft.files import verify_folder
from tests.tiny import tiny_processor, tiny_vlm


@pytest.mark.parametrize("tie", [False, True])
def test_round_trip(tmp_path: Path, tie: bool) -> None:
    model, _ = tiny_vlm("llava", tie=tie)
    before = os.umask(0o027)
    try:
        save_full(model, tiny_processor("llava"), tmp_path / "m", dtype=torch.bfloat16, max_shard_size="5GB")
    finally:
        os.umask(before)
    verify_folder(tmp_path / "m")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {0o640}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.dtype == torch.float32
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    AutoProcessor.from_pretrained(tmp_path / "m")
    wanted = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name].bfloat16()), name
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as stored:
        heads = [name for name in stored.keys() if "lm_head" in name]  # noqa: SIM118
    assert bool(heads) != tie


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    model, _ = tiny_vlm("llava")
    with pytest.raises(CheckpointError):
        save_full(model, tiny_processor("llava"), tmp_path / "m", dtype=torch.bfloat16, max_shard_size="5GB")
    assert (tmp_path / "m").read_text() == "mine"
