"""A fusion run whose text encoder is held in 4 bits: trained by LoRA beside a 16-bit picture encoder."""

from __future__ import annotations

import json

import bitsandbytes
import torch
import transformers

import mmft
from mmft.fusion import FusionModel
from tests.fusion.test_processor import tokenizer
from tests.fusion.test_run import cache, home, recipe  # noqa: F401  (fixtures)

torch.set_num_threads(1)


def test_a_quantized_encoder_trains_and_merges(home, tmp_path, monkeypatch):  # noqa: F811
    """Only the encoder that is asked for is quantized; the merged folder answers as the adapter model does."""
    torch.manual_seed(0)
    wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=32, **wide)
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    given = recipe(home, tmp_path / "runs")
    given["quantization"] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "parts": ["language"]}
    given["model"]["encoders"] |= {"text": str(tmp_path / "bert")}
    given["export"] = {"merge_onto": "dequantized"}
    held = []
    step = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(
        bitsandbytes.nn.Linear4bit, "forward", lambda self, x: (held.append(self.weight.quant_state), step(self, x))[1]
    )
    report = mmft.train(given, quiet=True)
    assert held and all(state is not None and state.quant_type == "nf4" for state in held)
    run = tmp_path / "runs" / "small"
    # the merge is onto the dequantized weights that training saw; sums in float32 differ by their order alone
    assert report["merge"]["proof"]["classification"]["max_difference"] < 1e-5
    merged = FusionModel.from_pretrained(run / "merged")
    assert not [one for one in merged.modules() if isinstance(one, bitsandbytes.nn.Linear4bit)]
    quantized = json.loads((run / "merged" / "merge_report.json").read_text())["quantized_modules"]
    assert quantized and all(name.startswith("encoders.note.") for name in quantized)
