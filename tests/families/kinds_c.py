"""Tiny models beside the image-text-to-text families: speech language models, dual encoders, encoder-decoders and
plain encoders."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from tests.families.tiny import SIDE, Impossible, Tiny, pixels, shrink, tokens

MELS = 16
"""Mel bands of a spectrogram."""
FRAMES = 32
"""Frames of a spectrogram: 16 after the strided convolution of a Whisper encoder."""
_WHISPER = {"max_source_positions": FRAMES // 2}


def _heard(config: PreTrainedConfig, count: int, **inputs: torch.Tensor) -> Tiny:
    return Tiny(config, {"input_ids": tokens(config, count), **inputs})


def _mel(frames: int = FRAMES, mels: int = MELS) -> torch.Tensor:
    return pixels(2, mels, frames)


def _all(frames: int = FRAMES) -> torch.Tensor:
    return torch.ones(2, frames, dtype=torch.long)


def qwen2_audio() -> Tiny:
    config = shrink("qwen2_audio", audio_config=_WHISPER)
    return _heard(config, FRAMES // 4, input_features=_mel(), feature_attention_mask=_all())


def voxtral() -> Tiny:
    config = shrink("voxtral", audio_config={**_WHISPER, "intermediate_size": 128}, audio_token_id=200)
    return _heard(config, FRAMES // 8, input_features=_mel())


def voxtral_realtime() -> Tiny:
    config = shrink("voxtral_realtime", audio_config={"intermediate_size": 128})
    words = tokens(config, 0, text=4)  # one token for each stretch of sound, which is added to it
    return Tiny(config, {"input_ids": words, "input_features": _mel()})


def glmasr() -> Tiny:
    config = shrink("glmasr", audio_config={"intermediate_size": 128})
    return _heard(config, FRAMES // 8, input_features=_mel(), input_features_mask=_all())


def fun_asr_nano() -> Tiny:
    config = shrink(
        "fun_asr_nano",
        audio_config={"num_timestamp_prediction_layers": 1},
        adaptor_config={"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 16},
    )
    stacked = MELS * config.audio_config.num_stacked_frames
    return _heard(config, 6, input_features=pixels(2, 6, stacked), input_features_mask=_all(6))


def granite_speech(model_type: str) -> Tiny:
    """Blocks of four frames become two query tokens each."""
    config = shrink(
        model_type,
        window_size=4,
        downsample_rate=2,
        encoder_config={"input_dim": MELS, "context_size": 8, "output_dim": 48},
        projector_config={"hidden_size": 48},
    )
    return _heard(config, 4, input_features=pixels(2, 8, MELS))


def moss_transcribe_diarize() -> Tiny:
    config = shrink("moss_transcribe_diarize", audio_config=_WHISPER)
    return _heard(config, FRAMES // 8, input_features=_mel(), input_features_mask=_all())


def qwen3_asr() -> Tiny:
    config = shrink("qwen3_asr", audio_config={"n_window_infer": 100})
    # One chunk: upstream counts 13 tokens for each chunk of 100 frames, whatever n_window is.
    return _heard(config, 13, input_features=_mel(100), input_features_mask=_all(100))


def vibevoice_asr() -> Tiny:
    """Two convolutional encoders, each halving the wave twice."""
    codec = {"num_filters": 16, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
    config = shrink("vibevoice_asr", acoustic_tokenizer_encoder_config=codec, semantic_tokenizer_encoder_config=codec)
    wave = pixels(2, 1, 16)
    return _heard(config, 4, input_values=wave, padding_mask=_all(16))


def kyutai_speech_to_text() -> Tiny:
    """Each step holds one text token and the codes of one frame of sound, all in `input_ids`."""
    codec = {
        "num_filters": 8,
        "upsampling_ratios": [2, 2],
        "codebook_size": 64,
        "codebook_dim": 32,
        "num_quantizers": 2,
        "vector_quantization_hidden_dimension": 32,
        "upsample_groups": 32,
        "sampling_rate": 400,
        "num_residual_layers": 1,
    }
    config = shrink(
        "kyutai_speech_to_text", num_codebooks=2, codebook_vocab_size=65, audio_pad_token_id=64, codec_config=codec
    )
    words = tokens(config, 0, text=8)
    codes = torch.randint(64, (2, 8, 2), generator=torch.Generator().manual_seed(3))
    inputs = torch.cat((words[..., None], codes), 2)
    other = torch.cat((words[..., None], (codes + 7) % 64), 2)
    return Tiny(config, {"input_ids": inputs}, other={"input_ids": other}, note="reads codes; its codec stays outside")


def nemo_speechlm() -> Tiny:
    """A recognition encoder and a speaker model side by side, Mamba, attention and expert layers behind."""
    config = shrink(
        "nemo_speechlm",
        audio_config={"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
    )
    return _heard(config, FRAMES // 8, input_features=pixels(2, FRAMES, MELS), input_features_mask=_all())


def phi4_multimodal() -> Tiny:
    """A picture of one crop beside its overview (2 x 2 patches after pooling, a line mark each, one separator)."""
    config = shrink(
        "phi4_multimodal",
        audio_config={
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "input_size": MELS,
            "nemo_final_size": 2,
        },
    )
    config.image_token_id = config.vision_config.image_token_id
    picture = {
        "image_pixel_values": pixels(2, 2, 3, SIDE, SIDE),
        "image_sizes": torch.full((2, 2), SIDE),
        "image_attention_mask": torch.ones(2, 2, 4, 4),
    }
    return _heard(config, 2 * (2 * 3) + 1, **picture)


def qwen2_5_omni() -> Tiny:
    """The whole with talker and vocoder; the thinker is what is trained and called."""
    config = shrink(
        "qwen2_5_omni",
        thinker_config=_omni_thinker() | {"audio_config": {"n_window": 8, **_WHISPER}},
        token2wav_config={
            "dit_config": {
                "emb_dim": 32,
                "mel_dim": 16,
                "enc_emb_dim": 16,
                "enc_dim": 16,
                "enc_channels": [16, 16, 16, 16, 48],
                "enc_attention_channels": 16,
                "enc_se_channels": 16,
            },
            "bigvgan_config": {"mel_dim": 16, "upsample_initial_channel": 64},
        },
    )
    speakers = io.BytesIO()
    torch.save({}, speakers)  # of every checkpoint; the class does not load without it and does not save it
    return dataclasses.replace(_thinking(config), files={"spk_dict.pt": speakers.getvalue()})


def qwen3_omni_moe() -> Tiny:
    """The whole with talker and vocoder; the thinker is what is trained and called."""
    config = shrink(
        "qwen3_omni_moe",
        thinker_config=_omni_thinker() | {"audio_config": {"n_window": 8, "n_window_infer": 32, **_WHISPER}},
        talker_config={
            "text_config": {"shared_expert_intermediate_size": 32},
            "spatial_merge_size": 2,
            "num_code_groups": 2,
            "accept_hidden_layer": 1,
        },
        code2wav_config={"decoder_dim": 64, "num_quantizers": 2, "codebook_size": 64},
    )
    return _thinking(config)


def _omni_thinker() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {
        "text_config": {"rope_parameters": rope},
        "vision_config": {"window_size": 16},
        "vision_start_token_id": 190,  # stated in the checkpoints' config.json, not by the class
    }


def _thinking(config: PreTrainedConfig) -> Tiny:
    patches = pixels(2 * 16, 3 * 2 * 8 * 8)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    ids = tokens(config.thinker_config, 4)
    inputs = {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "attention_mask": torch.ones_like(ids)}
    return Tiny(config, inputs, call="thinker")


def _dual(
    model_type: str, *, vision: str = "vision.attention", output: str = "logits_per_image", **overrides: Any
) -> Tiny:
    """A dual encoder: every text against every picture."""
    config = shrink(model_type, **overrides)
    ids = tokens(config, 0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(2, 3, SIDE, SIDE)}
    return Tiny(config, inputs, output=output, targets=("language.attention", vision))


def clip() -> Tiny:
    return _dual("clip", projection_dim=48)


def siglip() -> Tiny:
    return _dual("siglip", text_config={"projection_size": 32})


def siglip2() -> Tiny:
    tiny = _dual("siglip2", text_config={"projection_size": 32})
    patches = {
        "pixel_values": pixels(2, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }
    return dataclasses.replace(tiny, inputs={**tiny.inputs, **patches})


def align() -> Tiny:
    """The tower is convolutional: it has no attention, its squeeze layers are left alone."""
    config = shrink(
        "align",
        projection_dim=64,
        vision_config={
            "image_size": SIDE,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.0,
            "in_channels": [32, 16, 32],
            "out_channels": [16, 32, 64],
            "kernel_sizes": [3, 3, 3],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 1, 1],
            "expand_ratios": [1, 2, 2],
            "hidden_dim": 64,
        },
    )
    ids = tokens(config, 0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(2, 3, SIDE, SIDE)}
    return Tiny(config, inputs, output="logits_per_image")


def groupvit() -> Tiny:
    return _dual(
        "groupvit",
        projection_dim=48,
        projection_intermediate_dim=64,
        vision_config={"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    )


def vision_text_dual_encoder() -> Tiny:
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        shrink("vit"), shrink("bert"), projection_dim=48
    )
    ids = tokens(config, 0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(2, 3, SIDE, SIDE)}
    return Tiny(config, inputs, output="logits_per_image", targets=("language.attention", "vision.attention"))


def clap() -> Tiny:
    """A Swin tower over a spectrogram that is folded into a square."""
    config = shrink(
        "clap",
        projection_dim=48,
        audio_config={
            "spec_size": SIDE,
            "num_mel_bins": 8,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "window_size": 4,
            "patch_embeds_hidden_size": 16,
            "depths": [2, 2],
            "num_attention_heads": [1, 2],
            "hidden_size": 32,
            "enable_fusion": False,
        },
    )
    ids = tokens(config, 0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": pixels(2, 1, 128, 8),
        "is_longer": torch.zeros(2, 1, dtype=torch.bool),
    }
    return Tiny(config, inputs, output="logits_per_audio", targets=("language.attention", "audio.attention"))


def _decoder() -> PreTrainedConfig:
    return shrink("bert", is_decoder=True, add_cross_attention=True, tie_word_embeddings=False)


def vision_encoder_decoder() -> Tiny:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        shrink("vit", hidden_size=32, num_attention_heads=2, intermediate_size=64), _decoder()
    )
    inputs = {"pixel_values": pixels(2, 3, SIDE, SIDE), "decoder_input_ids": tokens(config, 0)}
    return Tiny(config, inputs)


def speech_encoder_decoder() -> Tiny:
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(_wav2vec2_config(32), _decoder())
    inputs = {"input_values": pixels(2, 320), "decoder_input_ids": tokens(config, 0)}
    return Tiny(config, inputs)


def _wav2vec2_config(width: int = 64) -> PreTrainedConfig:
    return shrink(
        "wav2vec2",
        hidden_size=width,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=[16, 16, 16],
        conv_stride=[5, 2, 2],
        conv_kernel=[10, 3, 3],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )


def wav2vec2() -> Tiny:
    config = _wav2vec2_config()
    return Tiny(config, {"input_values": pixels(2, 320)}, output="last_hidden_state", targets=("audio.attention",))


def whisper() -> Tiny:
    config = shrink("whisper", max_source_positions=FRAMES // 2, max_target_positions=32, decoder_start_token_id=1)
    inputs = {"input_features": _mel(), "decoder_input_ids": tokens(config, 0)}
    return Tiny(config, inputs, targets=("language.attention", "audio.attention"))


def bert() -> Tiny:
    config = shrink("bert")
    ids = tokens(config, 0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Tiny(config, inputs, output="last_hidden_state", note="reads no pictures")


def _seeing(model_type: str, *, target: str = "vision.attention", **overrides: Any) -> Tiny:
    config = shrink(model_type, **overrides)
    inputs = {"pixel_values": pixels(2, 3, SIDE, SIDE)}
    return Tiny(config, inputs, output="last_hidden_state", targets=(target,))


def timm_wrapper() -> Tiny:
    return _seeing("timm_wrapper", architecture="test_vit", model_args={"img_size": 32})


KINDS: dict[str, Callable[[], Tiny | Impossible]] = {
    "fun_asr_nano": fun_asr_nano,
    "glmasr": glmasr,
    "granite_speech": partial(granite_speech, "granite_speech"),
    "granite_speech_plus": partial(granite_speech, "granite_speech_plus"),
    "kyutai_speech_to_text": kyutai_speech_to_text,
    "moss_transcribe_diarize": moss_transcribe_diarize,
    "nemo_speechlm": nemo_speechlm,
    "phi4_multimodal": phi4_multimodal,
    "qwen2_5_omni": qwen2_5_omni,
    "qwen2_audio": qwen2_audio,
    "qwen3_asr": qwen3_asr,
    "qwen3_omni_moe": qwen3_omni_moe,
    "vibevoice_asr": vibevoice_asr,
    "voxtral": voxtral,
    "voxtral_realtime": voxtral_realtime,
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "chinese_clip": partial(_dual, "chinese_clip", projection_dim=48),
    "altclip": partial(_dual, "altclip", projection_dim=48),
    "align": align,
    "groupvit": groupvit,
    "vision-text-dual-encoder": vision_text_dual_encoder,
    "clap": clap,
    "vision-encoder-decoder": vision_encoder_decoder,
    "speech-encoder-decoder": speech_encoder_decoder,
    "bert": bert,
    "vit": partial(_seeing, "vit"),
    "dinov2": partial(_seeing, "dinov2"),
    "wav2vec2": wav2vec2,
    "whisper": whisper,
    "timm_wrapper": timm_wrapper,
}
