"""The proof of one family of each structural kind; all of them: `make test-families`."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from tests.families.expected import expected
from tests.families.flow import media_names, other_picture, other_text, reads
from tests.families.proof import OK, STEPS, Row, Wrong, prove
from tests.families.run import kinds, run_all, summary, table, wanted
from tests.families.tiny import Impossible, Tiny, image_token, pixels, shrink, special_tokens, tokens

STRUCTURES = {
    "llava": "tower, projector, decoder",
    "qwen2_5_vl": "packed patches, merger inside the tower, multimodal rotary positions",
    "smolvlm": "pixel shuffle before the projector",
    "mllama": "whole cross-attention layers in the decoder",
    "idefics": "gated cross-attention beside the decoder's layers, perceiver",
    "blip-2": "Q-Former with cross-attention of its own",
    "qwen3_vl_moe": "experts as one parameter, deep stacking",
    "florence2": "convolutional tower, encoder-decoder",
    "t5gemma2": "tower inside a text encoder, merged attention",
    "qwen2_audio": "sound in place of pictures",
    "whisper": "speech encoder-decoder, no projector",
    "clip": "two towers, a projection each",
    "vision-encoder-decoder": "composed of two models",
}
KNOWN, BROKEN = kinds()


@pytest.mark.parametrize("family", STRUCTURES)
def test_the_whole_proof_holds(family: str) -> None:
    row = prove(family, KNOWN[family])
    assert {step: getattr(row, step) for step in STEPS} == dict.fromkeys(STEPS, OK)


def test_every_family_of_transformers_has_a_row() -> None:
    assert BROKEN == {}
    groups = wanted()
    assert len(groups["image-text-to-text"]) >= 90 and len(groups["multimodal"]) >= 15  # 97 and 15 in 5.23
    missing = [name for names in groups.values() for name in names if name not in KNOWN]
    assert missing == []


def _copy(base: Path, adapter: Path, out: Path) -> SimpleNamespace:
    shutil.copytree(base, out)
    return SimpleNamespace(untied=())


def test_the_proof_fails_when_the_merge_leaves_the_base_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmft.export.merge

    monkeypatch.setattr(mmft.export.merge, "merge_adapter", _copy)
    row = prove("llava", KNOWN["llava"])
    assert "tensors differ from merge_and_unload" in row.merge
    assert "merge_and_unload gives another output" in row.logits
    assert not row.passed and row.possible and row.trouble.startswith("merge:")


def test_layers_in_a_wrong_part_are_seen_by_what_they_read() -> None:
    tiny = KNOWN["llava"]()
    assert isinstance(tiny, Tiny)
    from mmft.backbones.classes import model_class
    from mmft.backbones.parts import find_parts

    model = model_class(tiny.config)._from_config(tiny.config).eval()
    linear = find_parts(model).linear
    seen = reads(model, linear, tiny)
    want = expected("llava")
    assert {name: text for name in seen if (text := want.contradicts(name, linear[name][0], seen[name]))} == {}
    tower = next(name for name, home in linear.items() if home[0] == "vision" and name in seen)
    decoder = next(name for name, home in linear.items() if home[0] == "language")
    assert want.contradicts(tower, "language", seen[tower]) == f"{tower} is language and reads only pictures"
    assert want.contradicts(decoder, "vision", seen[decoder]) == f"{decoder} is vision and reads text"
    assert want.contradicts(decoder, "projector", (False, True)) == f"{decoder} is projector and reads only text"


def test_pictures_and_words_change_apart() -> None:
    tiny = KNOWN["llava"]()
    assert isinstance(tiny, Tiny)
    assert media_names(tiny) == ["pixel_values"]
    picture, text = other_picture(tiny), other_text(tiny)
    assert torch.equal(picture["input_ids"], tiny.inputs["input_ids"])
    assert not torch.equal(picture["pixel_values"], tiny.inputs["pixel_values"])
    assert torch.equal(text["pixel_values"], tiny.inputs["pixel_values"])
    marks = tiny.inputs["input_ids"] == image_token(tiny.config)
    assert torch.equal(text["input_ids"] == image_token(tiny.config), marks)
    plain = ~torch.isin(tiny.inputs["input_ids"], torch.tensor(sorted(special_tokens(tiny.config))))
    assert bool((text["input_ids"] != tiny.inputs["input_ids"])[plain].all())


def test_shrink_keeps_one_layer_of_each_kind_and_one_number_a_token() -> None:
    text = shrink("mllama").text_config
    assert text.num_hidden_layers == 2 and text.cross_attention_layers == [1]
    gemma = shrink("gemma3")
    assert sorted(gemma.text_config.layer_types) == ["full_attention", "sliding_attention"]
    hybrid = shrink("nemo_speechlm", audio_config={"diarization_config": {"head_config": {"audio_hidden_size": 32}}})
    assert hybrid.text_config.layers_block_type == ["linear_attention", "moe", "full_attention"]
    omni = shrink("qwen2_5_omni")
    assert omni.thinker_config.audio_token_id == omni.talker_config.audio_token_id < omni.talker_config.vocab_size
    assert shrink("llava", text_config={"num_hidden_layers": 5}).text_config.num_hidden_layers == 5
    qwen = shrink("qwen2_5_vl", vision_config={"out_hidden_size": 64})
    assert (qwen.text_config.hidden_size, qwen.vision_config.hidden_size) == (64, 32)


def test_tokens_hold_the_picture_in_the_middle_of_plain_words() -> None:
    config = shrink("llava")
    ids = tokens(config, 3, text=6)
    assert ids.shape == (2, 9) and bool((ids[:, 3:6] == config.image_token_id).all())
    words = torch.cat((ids[:, :3], ids[:, 6:]), 1)
    assert not special_tokens(config) & set(words.flatten().tolist())
    assert not torch.equal(words[0], words[1])


def _stop() -> Tiny:
    import os

    os._exit(3)


def _sleep() -> Tiny:
    import time

    time.sleep(60)
    raise AssertionError


def _refuse() -> Impossible:
    return Impossible("upstream says no")


def _blind() -> Tiny:
    config = shrink("llama")  # takes pixel_values and does not read them
    inputs = {"input_ids": tokens(config, 0), "pixel_values": pixels(2, 3, 32, 32)}
    return Tiny(config, inputs, cls=transformers.LlamaForCausalLM)


def test_a_crash_a_hang_and_a_refusal_cost_one_row_each(tmp_path: Path) -> None:
    made = {"stop": _stop, "sleep": _sleep, "refuse": _refuse}
    rows = run_all(["stop", "sleep", "refuse", "unwritten"], made, jobs=3, timeout=4.0)
    assert rows["stop"].built == "the process died (exit code 3)"
    assert rows["sleep"].built == "no answer within 4 s"
    assert rows["unwritten"].built == "no tiny model was written for this family"
    assert not rows["refuse"].possible and rows["refuse"].note == "upstream says no"
    shown = table(list(rows.values()))
    assert len(shown.splitlines()) == 5 and "cannot" in shown and "upstream says no" in shown
    good = Row("good", *[OK] * len(STEPS))
    groups = {"some": ["good", "stop", "refuse"], "rest": ["unwritten"]}
    found = summary([good, *rows.values()], groups)
    assert found == "1 of 3 some (1 cannot run), 0 of 1 rest"


def test_a_model_that_does_not_look_is_no_proof() -> None:
    assert prove("llava", _blind).built == "another picture does not change logits (0.0e+00)"
    with pytest.raises(Wrong, match="another picture does not change logits"):
        prove("llava", _blind, strict=True)
