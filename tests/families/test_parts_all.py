"""The parts of every multimodal family of the installed transformers at full size (on the meta device).

The table was read off the modeling files, not off the rule. Run with `pytest -m slow tests/families/test_parts_all.py`
(minutes); it prints one row per family.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from mmft.backbones.classes import default_config, model_class, on_meta
from mmft.backbones.parts import PARTS, find_parts, is_linear, owners
from mmft.errors import BackboneError

# part -> one module of it ("-": the class has none). `cross`: a module of the first cross-attention.
_LLAVA = "vision=model.vision_tower projector=model.multi_modal_projector language=model.language_model head=lm_head"
_SMOL = "vision=model.vision_model projector=model.connector language=model.text_model head=lm_head"
_QWEN = "vision=model.visual.blocks projector=model.visual.merger language=model.language_model head=lm_head"
_QWEN3 = _QWEN.replace("visual.merger", "visual.deepstack_merger_list")
_AUDIO = "audio=model.audio_tower projector=model.multi_modal_projector language=model.language_model head=lm_head"
_DUAL = "vision=vision_model projector=visual_projection language=text_model"
_QFORMER = (
    "vision=vision_model projector=qformer.encoder.layer.0.attention language=language_model.model "
    "head=language_model.lm_head cross=qformer.encoder.layer.0.crossattention"
)
_BERT_DECODER = (
    "language=decoder.bert.encoder.layer.0.attention head=decoder.cls "
    "cross=decoder.bert.encoder.layer.0.crossattention projector=-"
)


def _alike(families: str, row: str) -> dict[str, str]:
    return dict.fromkeys(families.split(), row)


EXPECTED: dict[str, str] = {
    **_alike(
        "aya_vision cohere2_vision deepseek_ocr2 fast_vlm gemma3 got_ocr2 internvl lfm2_vl lfm3_vl llava "
        "llava_next llava_next_video llava_onevision minimax_m3_vl mistral3 mistral_large4 molmo2 paligemma "
        "perception_lm pp_chart2table qianfan_ocr shieldgemma2 unlimited_ocr vipllava",
        _LLAVA,
    ),
    **_alike("idefics2 idefics3 smolvlm", _SMOL),
    **_alike("exaone4_5 glm46v glm4v glm4v_moe glm5_next glm_ocr glmga qwen2_vl qwen2_5_vl", _QWEN),
    **_alike("qwen3_5 qwen3_5_moe qwen4_exp", _QWEN),
    **_alike("cohere_compass cosmos3_omni qwen3_vl qwen3_vl_moe", _QWEN3),
    **_alike(
        "fun_asr_nano glmasr moss_transcribe_diarize nemo_speechlm qwen2_audio qwen3_asr voxtral voxtral_realtime",
        _AUDIO,
    ),
    **_alike("blip-2 instructblip instructblipvideo", _QFORMER),
    **_alike("clip chinese_clip altclip groupvit vision-text-dual-encoder", _DUAL),
    "siglip": _DUAL.replace("visual_projection", "logit_scale"),
    "siglip2": _DUAL.replace("visual_projection", "logit_scale"),
    "align": _DUAL.replace("visual_projection", "text_projection"),
    "blip": "vision=vision_model language=text_decoder.bert.embeddings head=text_decoder.cls projector=- "
    "cross=text_decoder.bert.encoder.layer.0.crossattention",
    "blip:BlipModel": _DUAL.replace("text_model", "text_model.embeddings")
    + " cross=text_model.encoder.layer.0.crossattention",
    "clap": "audio=audio_model projector=audio_projection language=text_model",
    "aria": _LLAVA.replace(
        "projector=model.multi_modal_projector", "projector=model.multi_modal_projector.feed_forward"
    )
    + " cross=model.multi_modal_projector.cross_attn",
    "chameleon": "vision=model.vqmodel language=model.layers head=lm_head projector=-",
    "emu3": "vision=model.vqmodel language=model.text_model head=lm_head projector=-",
    "cosmos3_edge": "vision=model.visual projector=model.projector language=model.language_model head=lm_head",
    "paddleocr_vl": "vision=model.visual projector=model.projector language=model.language_model head=lm_head",
    "deepseek_vl": "vision=model.vision_model projector=model.aligner language=model.language_model head=lm_head",
    "deepseek_vl_hybrid": "vision=model.high_res_vision_model projector=model.high_res_vision_neck "
    "language=model.language_model head=lm_head",
    "diffusion_gemma": "vision=model.encoder.vision_tower projector=model.encoder.embed_vision language=model.decoder "
    "head=lm_head",
    "dots3_note": "vision=model.vision_tower.blocks audio=model.audio_tower.layers projector=model.vision_tower.merger "
    "language=model.language_model head=lm_head",
    "ernie4_5_vl_moe": "vision=model.vision_tower projector=model.resampler_model language=model.language_model "
    "head=lm_head",
    # Its tower reads proteins; it stands where a picture encoder stands.
    "evolla": "vision=model.protein_encoder.model projector=model.protein_encoder.sequence_compressor_resampler "
    "language=model.layers.0.self_attn head=lm_head cross=model.layers.3.adapter",
    "florence2": _LLAVA.replace("language_model", "language_model.encoder")
    + " cross=model.language_model.decoder.layers.0.encoder_attn",
    "fuyu": "vision=- projector=model.vision_embed_tokens language=model.language_model head=lm_head",
    "gemma3n": "vision=model.vision_tower audio=model.audio_tower projector=model.embed_vision "
    "language=model.language_model head=lm_head",
    "gemma4": "vision=model.vision_tower audio=model.audio_tower projector=model.embed_audio "
    "language=model.language_model head=lm_head",
    # No towers: pixels and sound go through one embedder each.
    "gemma4_unified": "vision=- projector=model.embed_vision language=model.language_model head=lm_head",
    "git": "vision=git.image_encoder projector=git.visual_projection language=git.encoder head=output",
    "granite4_vision": "vision=model.vision_tower projector=model.image_newline language=model.language_model "
    "head=lm_head cross=model.layerwise_projectors.0.qformer.encoder.layer.0.crossattention",
    "granite_docling": "vision=model.vision_model.encoder projector=model.vision_model.connector "
    "language=model.text_model head=lm_head",
    "granite_speech": "audio=model.encoder projector=model.projector.linear language=model.language_model "
    "head=lm_head cross=model.projector.qformer.encoder.layer.0.crossattention",
    "apertus1p5": "vision=model.vision_tokenizer audio=model.audio_tokenizer language=model.language_model "
    "head=lm_head projector=-",
    "hy_v4_vl": "vision=model.vision_tower.layers projector=model.vision_tower.patch_merger "
    "language=model.language_model head=lm_head",
    "omniasr": _AUDIO,
    "hunyuan_vl": "vision=model.vision_tower.layers projector=model.vision_tower.patch_merger "
    "language=model.language_model head=lm_head",
    "hyperclovax_vision_v2": "vision=model.vision_model projector=model.projector language=model.language_model "
    "head=lm_head",
    "idefics": "vision=model.vision_model language=model.layers head=lm_head projector=- "
    "cross=model.gated_cross_attn_layers.0",
    **_alike(
        "inkling2 inkling2_loop",
        "vision=model.vision_tower.layers projector=model.vision_tower.merger language=model.language_model "
        "head=lm_head",
    ),
    "inkling_mm_model": "vision=model.vision_tower audio=model.audio_tower language=model.language_model head=lm_head "
    "projector=-",
    "janus": "vision=model.vqmodel projector=model.aligner language=model.language_model head=model.generation_head",
    "kimi_k25": "vision=model.vision_tower projector=model.mm_projector language=model.language_model head=lm_head",
    "kosmos-2": "vision=vision_model projector=image_to_text_projection.dense language=text_model.model "
    "head=text_model.lm_head cross=image_to_text_projection.x_attn",
    "kosmos-2.5": "vision=vision_model projector=image_to_text_projection.dense language=text_model.model "
    "head=text_model.lm_head cross=image_to_text_projection.x_attn",
    "kyutai_speech_to_text": "audio=codec_model language=model head=lm_head projector=-",
    "lighton_ocr": "vision=model.vision_encoder projector=model.vision_projection language=model.language_model "
    "head=lm_head",
    "llama4": "vision=vision_model projector=multi_modal_projector language=language_model.model "
    "head=language_model.lm_head",
    "minicpm_ocr": "vision=model.vision_tower projector=model.merger language=model.language_model head=lm_head",
    "minicpmv4_6": "vision=model.vision_tower projector=model.merger language=model.language_model head=lm_head",
    "minicpmv4_7": "vision=model.vision_tower projector=model.merger language=model.language_model head=lm_head",
    # Mapped as an image-text model, yet the class reads text only.
    "mistral4": "vision=- projector=- language=model.layers head=lm_head",
    "mllama": "vision=model.vision_model projector=model.multi_modal_projector language=model.language_model.layers.0 "
    "head=lm_head cross=model.language_model.layers.3",
    "muse_glimmer": "vision=model.vision_tower projector=model.vision_adapter language=model.language_model "
    "head=lm_head",
    "muse_spark": "vision=model.vision_tower audio=model.audio_tower projector=model.vision_adapter "
    "language=model.language_model head=lm_head",
    "nemotron_h_omni": "vision=vision_model projector=multi_modal_projector language=language_model.model "
    "head=language_model.lm_head",
    "ovis2": "vision=model.vision_tower projector=model.visual_embeddings_table language=model.language_model "
    "head=lm_head",
    "phi4_multimodal": "vision=model.embed_tokens_extend.image_embed.img_processor "
    "audio=model.embed_tokens_extend.audio_embed.encoder "
    "projector=model.embed_tokens_extend.image_embed.img_projection_up language=model.layers head=lm_head",
    "pi0": "vision=model.vlm.vision_tower projector=model.vlm.multi_modal_projector language=model.vlm.language_model "
    "head=action_out_proj",
    "pix2struct": "vision=encoder language=decoder.embed_tokens head=decoder.lm_head projector=- "
    "cross=decoder.layer.0.encoder_decoder_attention",
    "pp_formulanet": "vision=model.encoder.layers projector=model.encoder.multi_modal_projector "
    "language=model.decoder.embed_tokens head=lm_head cross=model.decoder.layers.0.encoder_attn",
    "qwen2_5_omni_thinker": _QWEN + " audio=model.audio_tower.layers",
    "qwen3_omni_moe_thinker": _QWEN + " audio=model.audio_tower.layers",
    "qwen2_5_omni": "vision=thinker.model.visual.blocks audio=thinker.model.audio_tower.layers "
    "projector=thinker.model.visual.merger language=thinker.model.language_model head=thinker.lm_head",
    "qwen3_omni_moe": "vision=thinker.model.visual.blocks audio=thinker.model.audio_tower.layers "
    "projector=thinker.model.visual.merger language=thinker.model.language_model head=thinker.lm_head",
    "step3p7": _LLAVA.replace("vision_tower", "vision_model"),
    "t5gemma2": "vision=model.encoder.vision_tower projector=model.encoder.multi_modal_projector "
    "language=model.encoder.text_model head=lm_head cross=model.decoder.layers.0.self_attn",
    # Pixels are cut into patches of the text width: a projector without a tower.
    "udop": "vision=- projector=patch_embed language=encoder.block head=lm_head cross=decoder.block.0.layer.1",
    "vibevoice_asr": "audio=model.semantic_tokenizer_encoder projector=model.multi_modal_projector "
    "language=model.language_model head=lm_head",
    "video_llama_3": "vision=model.vision_model projector=model.projector language=model.language_model head=lm_head",
    "video_llava": "vision=model.video_tower projector=model.multi_modal_projector language=model.language_model "
    "head=lm_head",
    "vision-encoder-decoder": "vision=encoder " + _BERT_DECODER,
    "speech-encoder-decoder": "audio=encoder " + _BERT_DECODER,
    "whisper": "audio=model.encoder language=model.decoder.embed_tokens head=proj_out projector=- "
    "cross=model.decoder.layers.0.encoder_attn",
    "bert": "language=encoder projector=-",
    "clip_text_model": "language=encoder projector=-",
    "vit": "vision=layers projector=-",
    "dinov2": "vision=encoder projector=-",
    "clip_vision_model": "vision=encoder projector=-",
    "timm_wrapper": "vision=timm_model projector=-",
    "wav2vec2": "audio=encoder projector=-",
}
EXPECTED["granite_speech_plus"] = EXPECTED["granite_speech"]
_FOREIGN = re.compile(
    r"Vision|Siglip|ViT|Audio(?!Text)|Speech|Pixtral|Timm|Resampler|Projector|QFormer|Patch(Embed|Merger)"
)


def build(family: str) -> Any:
    """A model of the family with its default config on the meta device; `type:Class` chooses the class."""
    model_type, _, architecture = family.partition(":")
    config = default_config(model_type)
    if architecture:
        config.architectures = [architecture]
    return on_meta(model_class(config), config)


def mistakes(model: Any, expected: str) -> list[str]:
    """What is wrong with the parts of `model`, in words."""
    parts = find_parts(model)
    wanted = dict(field.split("=") for field in expected.split())
    wanted["cross_attention"] = wanted.pop("cross", "-")
    held = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = []
    for part, prefix in wanted.items():
        if prefix == "-":
            found += [f"has a part {part}"] * (part in parts.names)
            continue
        under = [name for name in held if name == prefix or name.startswith(f"{prefix}.")]
        homes = sorted({parts.part_of(name) for name in under})
        if homes != [part]:
            found.append(f"{prefix} is {homes}, not {part}")
    for part in ("vision", "audio"):
        if part in parts.names and part not in wanted:
            found.append(f"has a part {part}")
    total = sum(parameter.numel() for parameter in model.parameters())
    if sum(parameter.numel() for _, parameter in owners(model, parts).values()) != total:
        found.append("the parts do not add up")
    linears = [name for part in PARTS for name in parts.linears(part)]
    if len(linears) != len(set(linears)) or any(not is_linear(model.get_submodule(name)) for name in linears):
        found.append("a linear layer is in two parts")
    if {"vision", "audio", "projector"} & set(parts.names):
        for name, module in model.named_modules():
            text_only = name and parts.part_of(name) == "language" and next(module.parameters(), None) is not None
            last = type(module).__name__.removeprefix(_family_prefix(model))
            if text_only and _FOREIGN.search(last):
                found.append(f"{name} ({type(module).__name__}) is language")
    return found


def _family_prefix(model: Any) -> str:
    """The family's own name in front of its class names (`Speech2Text`, `VisionEncoderDecoder`, `AyaVision`)."""
    name = type(model).__name__
    return re.split(r"ForConditional|ForCausal|ForProtein|ForVision|ForBlock|Model", name)[0]


@pytest.mark.slow
def test_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.models.auto import modeling_auto

    named = {
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    rows, wrong = [], []
    for family in sorted({*EXPECTED, *named}):
        try:
            model = build(family)
            bad = mistakes(model, EXPECTED[family]) if family in EXPECTED else ["is not in the table"]
        except BackboneError as error:
            bad = [str(error).splitlines()[0]]
        rows.append(f"{family:28} {'ok' if not bad else '; '.join(bad[:4])}")
        wrong += [rows[-1]] * bool(bad)
    with capsys.disabled():
        print("\n" + "\n".join([*rows, f"{len(rows) - len(wrong)} of {len(rows)} families have the right parts"]))
    assert not wrong, "\n".join(wrong)
