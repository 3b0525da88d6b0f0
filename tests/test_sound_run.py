"""A whole run on conversations about sounds: a tiny Qwen2-Audio learns to tell a high tone from a low one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

import mmft
from mmft.data.speech import tone, write_wav
from tests.data.test_render_media import hearing
from tests.runs import read_lines, write_recipe

torch.set_num_threads(1)
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EAR = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 8}


def save_model(folder: Path) -> Path:
    proc = hearing()
    proc.save_pretrained(folder)
    audio = proc.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    end = proc.tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = {**TEXT, "vocab_size": len(proc.tokenizer), "eos_token_id": end, "pad_token_id": 0}
    config = Qwen2AudioConfig(
        audio_config={**EAR, "model_type": "qwen2_audio_encoder", "max_source_positions": 200},
        text_config=text,
        audio_token_index=audio,
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config)
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    return folder


def write_rows(folder: Path, name: str, count: int, seed: int) -> Path:
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    with (folder / f"{name}.jsonl").open("w") as out:
        for at in range(count):
            high = bool(draw.integers(0, 2))
            pitch = float(draw.uniform(3000, 5000) if high else draw.uniform(200, 400))
            write_wav(folder / f"{name}{at}.wav", tone(np.full(int(draw.integers(4000, 9000)), pitch)))
            turns = [
                {"role": "user", "content": "<audio>High or low?"},
                {"role": "assistant", "content": "high" if high else "low"},
            ]
            out.write(json.dumps({"id": f"{name}{at}", "messages": turns, "audios": [f"{name}{at}.wav"]}) + "\n")
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict]:
    home = tmp_path_factory.mktemp("sound")
    changes = {
        "model.name_or_path": str(save_model(home / "model")),
        "data.train": [{"path": str(write_rows(home / "rows", "train", 48, 0))}],
        "data.eval": [{"path": str(write_rows(home / "rows", "held", 16, 1)), "name": "held"}],
        "adapter.targets": ["language.attention", "language.mlp", "projector"],
        "adapter.lora_dropout": 0.0,
        "train.max_steps": 60,
        "train.save_steps": 0,
        "train.per_device_train_batch_size": 4,
        "evaluate.group_by": [],
        "evaluate.metrics": ["exact_match"],
    }
    report = mmft.train(write_recipe(home, changes), quiet=True)
    return home / "runs" / "tiny", report


def test_the_tones_are_learned(done):
    run, report = done
    scores = {which: report["scores"][which]["exact_match"]["value"] for which in ("base", "adapter", "merged")}
    assert scores["base"] == 0.0 and scores["adapter"] > 0.9 and scores["merged"] == scores["adapter"]
    assert report["merge"]["proof"]["outputs"]["checked"]
    rows = read_lines(run / "predictions.jsonl")
    assert len(rows) == 16 and {row["answers"]["adapter"] for row in rows} <= {"high", "low"}
    assert (run / "report.html").is_file()
