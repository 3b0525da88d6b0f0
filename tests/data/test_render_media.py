"""Sounds and videos in conversations: the ids and tensors are those of the processor's own template call."""

from __future__ import annotations

import dataclasses
import io
import wave

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

from mmft.data.collate import collate
from mmft.data.loader import batches
from mmft.data.opened import blank, measure_of
from mmft.data.order import StepPlan
from mmft.data.render import IGNORED, Renderer
from mmft.data.sample import MediaRef, Piece, Sample, Turn
from mmft.errors import DataError
from tests.data.small import QWEN2_VL, encoded, picture, processor, tokenizer

RATE = 16000
QWEN2_AUDIO = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'audio' %}Audio: <|audio_bos|><|AUDIO|><|audio_eos|>\n{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOTH = QWEN2_VL.replace(
    "{% else %}{{ c.text }}",
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}",
)


def hearing() -> Qwen2AudioProcessor:
    names = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    own.add_special_tokens({"additional_special_tokens": names})
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=4), own, chat_template=QWEN2_AUDIO)


def sound(seconds: float, *, rate: int = RATE, seed: int = 0) -> tuple[np.ndarray, MediaRef]:
    """Samples as the reader gives them, and their WAV file."""
    values = np.random.default_rng(seed).integers(-9000, 9000, int(seconds * rate), dtype=np.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return values / np.float32(32768), MediaRef("audio", data=buffer.getvalue())


def video(frames: int, *, seed: int = 0, size: tuple[int, int] = (56, 84)) -> tuple[list, MediaRef]:
    pictures = [picture(seed + at, size) for at in range(frames)]
    return pictures, MediaRef("video", frames=tuple(MediaRef(data=encoded(one)) for one in pictures))


def row(*pieces: Piece, media: tuple[MediaRef, ...], answer: str = "a dog", id: str = "r") -> Sample:
    turns = (Turn("user", pieces), Turn("assistant", (Piece("text", answer),)))
    return Sample(id=id, turns=turns, media=media, where="rows.jsonl:1")


def own_call(proc, turns: list[dict], **options) -> dict[str, torch.Tensor]:
    return proc.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", **options)


def answer_of(rendered, proc) -> str:
    kept = rendered.labels != IGNORED
    assert torch.equal(rendered.labels[kept], rendered.input_ids[kept])
    return proc.tokenizer.decode(rendered.labels[kept])


@pytest.mark.parametrize("seconds", [(0.5,), (1.0, 2.3)])
def test_sounds_are_those_of_the_processors_own_call(seconds):
    proc, heard = hearing(), [sound(one, seed=at) for at, one in enumerate(seconds)]
    pieces = [*(Piece("audio") for _ in heard), Piece("text", "What is there?")]
    one = row(*pieces, media=tuple(ref for _, ref in heard))
    renderer = Renderer(proc, max_length=4096)
    found = renderer.render(one)
    content = [{"type": "audio", "audio": values} for values, _ in heard] + [{"type": "text", "text": "What is there?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]}
    turns = [{"role": "user", "content": content}, answer]
    want = own_call(proc, turns, sampling_rate=RATE)
    assert torch.equal(found.input_ids, want["input_ids"][0])
    for name in ("input_features", "feature_attention_mask"):
        torch.testing.assert_close(found.media[name], want[name], rtol=0, atol=1e-5)
    assert answer_of(found, proc) == "a dog<|im_end|>"
    slow = renderer.render_slowly(one)
    assert torch.equal(slow.labels, found.labels)
    assert renderer.length(one) == len(found.input_ids)
    audio = proc.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
    assert found.media_tokens == int((found.input_ids == audio).sum()) > 10 * len(seconds)
    prompt = renderer.prompt(one)
    assert torch.equal(prompt.input_ids, found.input_ids[: len(prompt.input_ids)])


def test_other_rates_are_resampled_before_they_are_counted():
    one = row(Piece("audio"), Piece("text", "What?"), media=(sound(1.7, rate=44100)[1],))
    renderer = Renderer(hearing(), max_length=4096)
    assert renderer.length(one) == len(renderer.render(one).input_ids)


@pytest.mark.parametrize(("frames", "taken"), [(3, 8), (12, 4)])
def test_videos_are_those_of_the_processors_own_call(frames, taken):
    proc = processor("qwen2_vl", BOTH)
    pictures, ref = video(frames)
    one = row(
        Piece("video"), Piece("image"), Piece("text", "What is there?"), media=(ref, MediaRef(data=encoded(picture(9))))
    )
    renderer = Renderer(proc, max_length=4096, video_frames=taken)
    found = renderer.render(one)
    chosen = pictures if frames <= taken else [pictures[int((at + 0.5) * frames / taken)] for at in range(taken)]
    content = [
        {"type": "video", "video": chosen},
        {"type": "image", "image": picture(9)},
        {"type": "text", "text": "What is there?"},
    ]
    turns = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ]
    want = own_call(proc, turns, processor_kwargs={"do_sample_frames": False})
    assert torch.equal(found.input_ids, want["input_ids"][0])
    for name in ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw"):
        assert torch.equal(found.media[name], want[name]), name
    assert answer_of(found, proc) == "a dog<|im_end|>" and renderer.length(one) == len(found.input_ids)
    assert torch.equal(renderer.render_slowly(one).labels, found.labels)


def test_rows_with_and_without_sound_are_one_batch():
    proc = hearing()
    renderer = Renderer(proc, max_length=4096)
    rows = [
        row(Piece("audio"), Piece("text", "What?"), media=(sound(0.4 + at, seed=at)[1],), id=str(at)) for at in range(3)
    ]
    rows.append(row(Piece("text", "Who?"), media=(), id="text"))
    batch = collate([renderer.render(one) for one in rows], pad_token_id=0)
    assert batch.inputs["input_features"].shape[0] == 3 and batch.inputs["input_ids"].shape[0] == 4
    plan = StepPlan(rows=4, micro_batch=2, micro_per_step=2)
    common = {"start_step": 0, "stop_step": 2, "rank": 0, "pad_token_id": 0}
    plain, ahead = (list(batches(rows, renderer, plan, workers=workers, **common)) for workers in (0, 2))
    for one, other in zip(plain, ahead, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.inputs.keys() == b.inputs.keys() and all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)


def test_pictures_shrink_beside_a_video_that_stays():
    proc = processor("qwen2_vl", BOTH)
    _, ref = video(4)
    large = MediaRef(data=encoded(picture(3, (112, 112))))
    one = row(Piece("image"), Piece("video"), Piece("text", "What?"), media=(large, ref))
    whole = Renderer(proc, max_length=4096).render(one)
    tight = Renderer(proc, max_length=len(whole.input_ids) - 4, over_length="shrink_images")
    found = tight.render(one)
    assert torch.equal(found.media["pixel_values_videos"], whole.media["pixel_values_videos"])
    assert len(found.input_ids) <= tight.max_length < len(whole.input_ids)
    assert found.media["pixel_values"].shape[0] < whole.media["pixel_values"].shape[0]


def test_a_silent_sound_names_its_row():
    _, ref = sound(0.5)
    silent = dataclasses.replace(ref, data=ref.data[:44] + b"\0" * (len(ref.data) - 44))
    with pytest.raises(DataError, match=r"silent[\s\S]*rows.jsonl:1"):
        Renderer(hearing(), max_length=4096).render(row(Piece("audio"), Piece("text", "What?"), media=(silent,)))


@pytest.mark.parametrize("measure", [("image", 5, 7, 1), ("audio", 0, 0, 9), ("video", 4, 6, 3)])
def test_blank_media_measure_as_asked(measure):
    assert measure_of(blank(measure)) == measure
