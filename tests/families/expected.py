"""What the parts of a family must be: named here from the papers and the modeling files, checked against mmft."""

from __future__ import annotations

from dataclasses import dataclass

_ENCODERS = {
    "bert": ("language",),
    "wav2vec2": ("audio",),
    **dict.fromkeys(("vit", "dinov2", "timm_wrapper"), ("vision",)),
}
_AUDIO = {
    *("fun_asr_nano", "glmasr", "granite_speech", "granite_speech_plus", "kyutai_speech_to_text", "clap"),
    *("moss_transcribe_diarize", "nemo_speechlm", "qwen2_audio", "qwen3_asr", "vibevoice_asr", "voxtral"),
    *("voxtral_realtime", "omniasr", "wav2vec2", "whisper", "speech-encoder-decoder"),
}
"""Families that hear and do not see."""
_CROSSING = {
    *("mllama", "idefics", "blip-2", "instructblip", "instructblipvideo", "t5gemma2", "udop", "kosmos-2", "kosmos-2.5"),
    *("whisper", "vision-encoder-decoder", "speech-encoder-decoder", "florence2", "blip", "pix2struct", "evolla"),
    *("pp_formulanet",),
}
"""Families with cross-attention to pictures, sound or an encoded text."""
_DUAL = {
    "clip",
    "siglip",
    "siglip2",
    "chinese_clip",
    "altclip",
    "align",
    "groupvit",
    "vision-text-dual-encoder",
    "clap",
}
_NO_PROJECTOR: dict[str, str] = {
    **dict.fromkeys(("bert", "vit", "dinov2", "timm_wrapper", "wav2vec2", "whisper"), "one encoder"),
    **dict.fromkeys(("siglip", "siglip2"), "both towers end at the common width"),
    "kyutai_speech_to_text": "codes of the sound are tokens of the language model",
    **dict.fromkeys(
        ("chameleon", "emu3", "apertus1p5"), "pictures become numbers of a code book and go through the token table"
    ),
    "inkling_mm_model": "the tower's own folding layers end at the language model's width",
    "blip": "the text decoder's cross-attention reads the tower's width",
    "pix2struct": "the decoder's cross-attention reads the tower's width",
    "vision-encoder-decoder": "enc_to_dec_proj only where the widths differ",
    "speech-encoder-decoder": "enc_to_dec_proj only where the widths differ",
}
_NO_TOWER: dict[str, str] = {
    "fuyu": "patches go through one linear layer, which is the projector",
    "udop": "patches go through one linear layer, which is the projector",
    "gemma4_unified": "patches go through one embedding layer, which is the projector",
}
_TEXT_IN_BRIDGE = {"instructblip", "instructblipvideo", *_DUAL}
"""Families whose Q-Former reads the question too, and those with a projection of each side into a common space."""


@dataclass(frozen=True)
class Expected:
    """Parts that a family must and must not have."""

    parts: tuple[str, ...]
    without: tuple[str, ...] = ()
    blind: bool = False  # reads text alone
    text_in_bridge: bool = False

    def contradicts(self, name: str, part: str, found: tuple[bool, bool]) -> str:
        """What is wrong with a layer in `part` whose input depends on (picture, text); empty when nothing is.

        A tower reads pictures and no text. The language model never reads pictures alone, else a piece of the tower or
        of the projector would be in it. A projector does not read text alone.
        """
        picture, text = found
        if part in ("vision", "audio") and text:
            return f"{name} is {part} and reads text"
        if part == "language" and picture and not text:
            return f"{name} is language and reads only pictures"
        if part == "projector" and text and not picture and not self.text_in_bridge:
            return f"{name} is projector and reads only text"
        return ""


def expected(family: str) -> Expected:
    """What is expected of a family."""
    if family in _ENCODERS:
        parts = _ENCODERS[family]
        others = tuple(p for p in ("vision", "audio", "projector", "cross_attention", "language") if p not in parts)
        return Expected(parts, others, blind=family == "bert")
    found = ["language"]
    if family not in _NO_TOWER:
        found.append("audio" if family in _AUDIO else "vision")
    if family not in _NO_PROJECTOR:
        found.append("projector")
    if family in _CROSSING:
        found.append("cross_attention")
    without = ("vision",) if family in _AUDIO else ()
    return Expected(tuple(found), without, text_in_bridge=family in _TEXT_IN_BRIDGE)
