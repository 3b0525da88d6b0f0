"""Parts are disjoint, add up, and lie where the family's own code says they do."""

from __future__ import annotations

import pytest
import torch

from mmft.backbones.flow import flow_roots
from mmft.backbones.parts import PARTS, SUBPARTS, count, find_parts, is_linear, owners
from mmft.backbones.roots import Names
from tests.tiny import KINDS, tiny_inputs, tiny_vlm

TRUTH = {  # read off the modeling files: vision tower, projector, language model
    "llava": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "smolvlm": ("model.vision_model", "model.connector", "model.text_model"),
    "idefics3": ("model.vision_model", "model.connector", "model.text_model"),
    "qwen2_vl": ("model.visual.blocks", "model.visual.merger", "model.language_model"),
    "qwen2_5_vl": ("model.visual.blocks", "model.visual.merger", "model.language_model"),
    "mllama": ("model.vision_model", "model.multi_modal_projector", "model.language_model.layers.0"),
    "paligemma": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "internvl": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
    "fast_vlm": ("model.vision_tower", "model.multi_modal_projector", "model.language_model"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [False, True])
def test_parts_are_disjoint_and_add_up(kind: str, tie: bool) -> None:
    if tie and kind == "mllama":
        pytest.skip("mllama's table has eight rows more than its head: it cannot be tied")
    model, _ = tiny_vlm(kind, tie=tie)
    parts = find_parts(model)
    rows = count(model, parts)
    assert sum(row["parameters"] for row in rows.values()) == sum(p.numel() for p in model.parameters())
    assert {id(p) for _, p in owners(model, parts).values()} == {id(p) for p in model.parameters()}
    assert set(rows) <= set(PARTS)
    linears = [name for part in PARTS for name in parts.linears(part)]
    assert sorted(linears) == sorted(name for name, module in model.named_modules() if is_linear(module))
    assert linears == [name for part in PARTS for name in parts.linears(part)]
    for part in PARTS:
        by_sub = [name for sub in SUBPARTS for name in parts.linears(part, sub)]
        assert sorted(by_sub) == sorted(parts.linears(part))
    assert parts.tied_head == tie
    assert (rows["head"]["parameters"] == 0) == tie
    assert parts.part_of("lm_head.weight") == "head"


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_where_the_family_has_them(kind: str) -> None:
    model, _ = tiny_vlm(kind)
    parts = find_parts(model)
    for part, prefix in zip(("vision", "projector", "language"), TRUTH[kind], strict=True):
        held = [name for name, _ in model.named_parameters() if name.startswith(prefix + ".")]
        assert held
        assert {parts.part_of(name) for name in held} == {part}
    table = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    assert (parts.part_of(table), parts.subpart_of(f"{table}.weight")) == ("language", "embedding")
    attention = parts.linears("language", "attention")
    assert attention and all(".self_attn." in name for name in attention)
    assert parts.linears("language", "mlp") and all(".mlp." in name for name in parts.linears("language", "mlp"))
    assert parts.linears("language", "other") == []


def test_the_cross_attention_layers_of_mllama_are_a_part() -> None:
    model, config = tiny_vlm("mllama")
    parts = find_parts(model)
    layers = config.text_config.cross_attention_layers
    for number in range(config.text_config.num_hidden_layers):
        expected = "cross_attention" if number in layers else "language"
        assert parts.part_of(f"model.language_model.layers.{number}.mlp.up_proj.weight") == expected
    assert parts.subpart_of("model.language_model.layers.1.cross_attn.q_proj") == "attention"
    assert parts.subpart_of("model.language_model.layers.1.input_layernorm.weight") == "norm"


@pytest.mark.parametrize(
    ("model_type", "part", "prefix"),
    [
        ("blip-2", "projector", "qformer.encoder.layer.0.attention"),
        ("blip-2", "cross_attention", "qformer.encoder.layer.0.crossattention"),
        ("evolla", "vision", "model.protein_encoder.model"),
        ("evolla", "cross_attention", "model.layers.3.adapter"),
        ("pi0", "projector", "model.vlm.multi_modal_projector"),
        ("janus", "head", "model.generation_head"),
        ("kosmos-2", "cross_attention", "image_to_text_projection.x_attn"),
        ("t5gemma2", "cross_attention", "model.decoder.layers.0.self_attn"),
        ("udop", "projector", "patch_embed"),
        ("phi4_multimodal", "projector", "model.embed_tokens_extend.audio_embed.up_proj_for_speech"),
        ("pix2struct", "cross_attention", "decoder.layer.0.encoder_decoder_attention"),
        ("gemma4", "audio", "model.audio_tower"),
        ("whisper", "audio", "model.encoder"),
        ("whisper", "cross_attention", "model.decoder.layers.0.encoder_attn"),
        ("speech-encoder-decoder", "audio", "encoder"),
        ("vision-encoder-decoder", "cross_attention", "decoder.bert.encoder.layer.0.crossattention"),
        ("clip", "language", "text_model"),
        ("clap", "projector", "audio_projection"),
        ("bert", "language", "encoder"),
        ("dinov2", "vision", "embeddings"),
        ("wav2vec2", "audio", "feature_projection"),
        ("timm_wrapper", "vision", "timm_model"),
        ("blip-2", "projector", "query_tokens"),
        ("llava_next", "projector", "model.image_newline"),
        ("idefics2", "projector", "model.connector.perceiver_resampler"),
        ("idefics", "cross_attention", "model.gated_cross_attn_layers.0"),
        ("qwen3_vl", "projector", "model.visual.deepstack_merger_list"),
        ("qwen2_5_omni_thinker", "audio", "model.audio_tower.layers"),
        ("qwen2_5_omni_thinker", "projector", "model.audio_tower.proj"),
        ("llama4", "vision", "vision_model.vision_adapter"),
        ("florence2", "cross_attention", "model.language_model.decoder.layers.0.encoder_attn"),
        ("pix2struct", "vision", "encoder"),
        ("fuyu", "projector", "model.vision_embed_tokens"),
        ("git", "vision", "git.image_encoder"),
        ("video_llava", "vision", "model.video_tower"),
        ("instructblip", "language", "language_model.model.decoder"),
        ("t5gemma2", "projector", "model.encoder.multi_modal_projector"),
        ("molmo2", "projector", "model.multi_modal_projector.image_pooling_2d"),
    ],
)
def test_odd_families_at_full_size(model_type: str, part: str, prefix: str) -> None:
    from mmft.backbones.load import meta_model

    model = meta_model(model_type)
    parts = find_parts(model)
    held = [name for name, _ in model.named_parameters() if name == prefix or name.startswith(prefix + ".")]
    assert held and {parts.part_of(name) for name in held} == {part}
    assert sum(row["parameters"] for row in count(model, parts).values()) == sum(
        p.numel() for p in {id(p): p for p in model.parameters()}.values()
    )


def test_stacked_experts_are_seen_and_are_no_linears() -> None:
    from mmft.backbones.load import meta_model

    parts = find_parts(meta_model("qwen3_vl_moe"))
    assert parts.experts and all(".experts." in name for name in parts.experts)
    assert set(parts.experts.values()) == {("language", "mlp")}


def test_layers_inside_multihead_attention_are_left_alone() -> None:
    attention = torch.nn.MultiheadAttention(8, 2)
    assert is_linear(attention.out_proj)  # it is a Linear, but its forward is never called
    from mmft.backbones.load import meta_model

    model = meta_model("deepseek_vl")
    names = find_parts(model).linears("vision")
    inside = [n for n, m in model.named_modules() if isinstance(m, torch.nn.MultiheadAttention)]
    assert inside and not [name for name in names if any(name.startswith(f"{top}.") for top in inside)]


class Silent(torch.nn.Module):
    """A model that tells nothing of itself: no accessor, no config, no telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
        self.two = torch.nn.Linear(24, 16)
        self.three = torch.nn.Embedding(32, 16)
        self.four = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(2)])
        self.config = None

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.three

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        states = self.three(input_ids) + self.two(self.one(pixel_values)).mean(1, keepdim=True)
        for layer in self.four:
            states = layer(states)
        return states


def test_a_forward_pass_tells_what_structure_does_not() -> None:
    model = Silent()
    inputs = {"input_ids": torch.arange(10).view(2, 5), "pixel_values": torch.randn(2, 3, 12)}
    assert find_parts(model).names == ("language",)
    parts = find_parts(model, inputs=inputs)
    assert parts.linears("vision") == ["one.0", "one.2"]
    assert parts.linears("projector") == ["two"]
    assert parts.linears("language") == ["four.0", "four.1"]


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "fast_vlm"])
def test_data_flow_says_what_the_accessors_say(kind: str) -> None:
    model, _ = tiny_vlm(kind)
    found = flow_roots(model, Names(model), tiny_inputs(kind))
    assert {find_parts(model).part_of(name): part for name, part in found.items()} == {
        "vision": "vision",
        "projector": "projector",
    }
