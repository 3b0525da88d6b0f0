"""Tiny captioners of every kind with their processors, and pairs that they can learn: a picture of one colour."""

from __future__ import annotations

import functools
import json
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from mmft.data.captions import CaptionRenderer, caption_shape
from mmft.data.sample import MediaRef, Sample
from tests.families.kinds_a import blip as tiny_blip
from tests.families.kinds_a import blip_2 as tiny_blip_2
from tests.families.kinds_a2 import florence2 as tiny_florence2
from tests.families.kinds_a2 import git as tiny_git
from tests.families.kinds_b2 import pix2struct as tiny_pix2struct
from tests.families.kinds_c import _wav2vec2_config as tiny_wav2vec2
from tests.families.shrink import VOCABULARY, shrink
from tests.objectives.pairs import pair_rows
from tests.runs import workshop
from tests.tiny import SIDE, tiny_tokenizer

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMPOSED = ("bert", "gpt2", "bart", "trocr")
"""Decoders of a VisionEncoderDecoderModel: a masked and a causal language model, the decoder of an encoder-decoder, and
a decoder of its own."""
PICTURES = (*COMPOSED, "git", "blip", "florence2", "pix2struct")


def tokenizer(*, framed: bool = False) -> Any:
    """A token for each byte; `framed`: with a start and an end token around a text, as BERT's."""
    found = tiny_tokenizer()
    if framed:
        start, end = found.convert_ids_to_tokens([1, 2])
        found._tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, 1), (end, 2)]
        )
    return found


def image_processor(side: int = SIDE) -> Any:
    square = {"height": side, "width": side}
    return transformers.CLIPImageProcessor(size=square, crop_size=square, do_center_crop=False)


def _decoder(kind: str) -> Any:
    told = {"is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": False, **IDS}
    if kind == "bart":
        told |= {"is_encoder_decoder": False, "forced_eos_token_id": None}
    if kind == "trocr":
        told |= {"cross_attention_hidden_size": 32}
    return shrink(kind, **told)


def _composed(kind: str) -> tuple[Any, Any]:
    vit = shrink("vit", hidden_size=32, num_attention_heads=2, intermediate_size=64)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        vit, _decoder(kind), decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
    )
    wrapped = transformers.TrOCRProcessor(image_processor=image_processor(), tokenizer=tokenizer(framed=kind == "bert"))
    return transformers.VisionEncoderDecoderModel(config), wrapped


def _git() -> tuple[Any, Any]:
    config = tiny_git().config
    config.vocab_size = VOCABULARY
    wrapped = transformers.GitProcessor(image_processor(), tokenizer(framed=True))
    return transformers.GitForCausalLM(config), wrapped


def _blip() -> tuple[Any, Any]:
    config = tiny_blip().config
    config.text_config.vocab_size, config.text_config.label_smoothing = VOCABULARY, 0.0
    config.text_config.bos_token_id = 5  # [DEC]: not what the tokenizer puts in front
    square = {"height": SIDE, "width": SIDE}
    pictures = transformers.BlipImageProcessor(size=square)
    return transformers.BlipForConditionalGeneration(config), transformers.BlipProcessor(
        pictures, tokenizer(framed=True)
    )


def _blip_2() -> tuple[Any, Any]:
    config, known = tiny_blip_2().config, tokenizer()
    # Its processor takes a tokenizer that has no image token yet (one that has it must hold it as an AddedToken).
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=known._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<end>"
    )
    config.text_config.vocab_size, config.image_token_index = VOCABULARY, known.image_token_id
    pictures = transformers.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    wrapped = transformers.Blip2Processor(pictures, words, num_query_tokens=4)
    return transformers.Blip2ForConditionalGeneration(config), wrapped


def _florence2() -> tuple[Any, Any]:
    config, words = tiny_florence2().config, tokenizer()
    config.text_config.vocab_size = VOCABULARY
    for name, value in {**IDS, "decoder_start_token_id": 2, "forced_eos_token_id": None}.items():
        setattr(config.text_config, name, value)
    config.image_token_id = words.image_token_id
    # Its captions begin with the end token; a tied random head would say that again.
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    pictures = image_processor(64)
    pictures.image_seq_length = 5
    wrapped = transformers.Florence2Processor(image_processor=pictures, tokenizer=words)
    return transformers.Florence2ForConditionalGeneration(config), wrapped


def _pix2struct() -> tuple[Any, Any]:
    config = tiny_pix2struct().config
    config.decoder_start_token_id = config.pad_token_id = 0
    pictures = transformers.Pix2StructImageProcessor(patch_size={"height": 4, "width": 4}, max_patches=16)
    config.eos_token_id = config.text_config.eos_token_id = 2
    wrapped = transformers.Pix2StructProcessor(pictures, tokenizer())
    wrapped.image_processor.max_patches = 16
    return transformers.Pix2StructForConditionalGeneration(config), wrapped


def _whisper() -> tuple[Any, Any]:
    config = shrink("whisper", max_source_positions=16, max_target_positions=32, decoder_start_token_id=1, **IDS)
    config.num_mel_bins = 16
    heard = transformers.WhisperFeatureExtractor(feature_size=16, hop_length=500, chunk_length=1, n_fft=1000)
    wrapped = transformers.WhisperProcessor(heard, tokenizer())
    return transformers.WhisperForConditionalGeneration(config), wrapped


def _speech() -> tuple[Any, Any]:
    heard_by = tiny_wav2vec2(32)
    heard_by.feat_extract_norm = "layer"  # the norm over time of the other kind takes the padding in
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
        heard_by, _decoder("bert"), decoder_start_token_id=1, pad_token_id=0, eos_token_id=2
    )
    heard = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    wrapped = transformers.Wav2Vec2Processor(heard, tokenizer(framed=True))
    return transformers.SpeechEncoderDecoderModel(config), wrapped


_MAKERS: Mapping[str, Callable[[], tuple[Any, Any]]] = {
    **{kind: functools.partial(_composed, kind) for kind in COMPOSED},
    "git": _git,
    "blip": _blip,
    "blip-2": _blip_2,
    "florence2": _florence2,
    "pix2struct": _pix2struct,
    "whisper": _whisper,
    "speech": _speech,
}
SOUNDS = ("whisper", "speech")


def tiny_captioner(kind: str) -> tuple[Any, Any]:
    """A model with weights that say something of the picture, in eval mode, and its processor."""
    torch.manual_seed(0)
    model, processor = _MAKERS[kind]()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(0, 0.08)
    model.generation_config.update(forced_eos_token_id=None, **IDS)
    return model.eval(), processor


@functools.cache
def captioner_folder(kind: str) -> Path:
    folder = workshop() / f"captioner-{kind}"
    model, processor = tiny_captioner(kind)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def renderer_of(model: Any, processor: Any, **options: Any) -> CaptionRenderer:
    shape = caption_shape(type(model), model.config)
    return CaptionRenderer(processor, shape, **{"max_length": 64, "captions": 1, **options})


@functools.cache
def sound_folder() -> Path:
    """Eight tones of different heights and lengths as WAV files."""
    folder = workshop() / "tones"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        steps = np.arange(6000 + 800 * number)
        wave_form = (12000 * np.sin(steps * (0.02 + 0.05 * number))).astype("<i2")
        with wave.open(str(folder / f"{number}.wav"), "wb") as out:
            out.setparams((1, 2, 16000, 0, "NONE", ""))
            out.writeframes(wave_form.tobytes())
    return folder


def samples(count: int = 4, *, sound: bool = False) -> list[Sample]:
    """Pairs with captions of different lengths."""
    root = sound_folder() if sound else pair_rows(8).parent
    words = ("red", "a green square", "blue blue blue", "white and more", "x", "yes", "black", "z z")
    return [
        Sample(
            id=f"s{number}",
            turns=(),
            media=(MediaRef("audio", f"{number}.wav", root) if sound else MediaRef(path=f"{number}.png", root=root),),
            answers=(words[number % 8], f"one {words[number % 8]} thing"),
            source="small",
            where=f"rows.jsonl:{number + 1}",
        )
        for number in range(count)
    ]


@functools.cache
def sound_rows() -> Path:
    """The tones with a word each, as rows of pairs."""
    words = ("low", "deep", "middle", "hum", "high", "shrill", "sharp", "top")
    path = sound_folder() / "rows.jsonl"
    lines = [json.dumps({"audio": f"{place}.wav", "caption": word}) for place, word in enumerate(words)]
    path.write_text("\n".join(lines) + "\n")
    return path


def values(folder: Path, changes: Mapping[str, Any] | None = None, *, kind: str = "bart") -> dict[str, Any]:
    """A captioning recipe: LoRA in cross-attention, 8 rows a step in two micro-batches, fp32; `changes` by dots."""
    sound = kind in SOUNDS
    recipe: dict[str, Any] = {
        "name": "captions",
        "model": {"name_or_path": str(captioner_folder(kind)), "dtype": "float32"},
        "adapter": {
            "targets": ["language.attention"] if kind == "git" else ["cross_attention"],
            "lora_rank": 8,
            "lora_dropout": 0.1,
        },
        "data": {
            "train": [{"path": str(sound_rows() if sound else pair_rows())}],
            "eval": [{"path": str(sound_rows() if sound else pair_rows(8, 1)), "name": "held"}],
            "max_length": 32,
        },
        "objective": {"name": "captioning", "captions_per_image": 1},
        "train": {
            "output_dir": str(folder / "runs"),
            "per_device_train_batch_size": 4,
            "effective_batch_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "bf16": False,
            "save_steps": 2,
            "logging_steps": 1,
        },
        "evaluate": {
            "metrics": ["cider", "bleu"],
            "bootstrap_samples": 50,
            "per_device_eval_batch_size": 8,
            "max_new_tokens": 8,
        },
        "export": {"verify_rows": 4},
    }
    for key, value in (changes or {}).items():
        *sections, last = key.split(".")
        place = recipe
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return recipe
