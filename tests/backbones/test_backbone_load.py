"""Loading: what is loaded equals what was saved, and each way to be wrong has its own message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmft.backbones.fingerprint import digest, fingerprint
from mmft.backbones.load import chat_template, load_backbone, load_processor, meta_backbone, model_class
from mmft.errors import BackboneError
from mmft.recipe.schema import ModelSection
from tests.tiny import WORKING, save_tiny_vlm, tiny_inputs, tiny_tokenizer, tiny_vlm


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vlm(tmp_path_factory.mktemp("llava"), "llava")


def section(folder: Path | str, **more: str) -> ModelSection:
    return ModelSection.model_validate({"name_or_path": str(folder), "dtype": "float32", **more})


@pytest.mark.parametrize("kind", WORKING)
def test_a_loaded_backbone_computes_what_was_saved(kind: str, tmp_path: Path) -> None:
    backbone = load_backbone(section(save_tiny_vlm(tmp_path / "m", kind)))
    model, _ = tiny_vlm(kind)
    inputs = tiny_inputs(kind, batch=2)
    with torch.no_grad():
        got, expected = backbone.model(**inputs).logits, model(**inputs).logits
    # Convolutions may choose another kernel for another memory alignment; everything else is bit-equal.
    assert torch.allclose(got, expected, atol=1e-5) if kind == "fast_vlm" else torch.equal(got, expected)
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert backbone.folder == (tmp_path / "m").resolve()
    assert backbone.pad_token_id == 0 and backbone.quantized is False
    assert "<assistant>" in chat_template(backbone)


def test_dtype_and_attention_kernel_are_what_was_asked(llava: Path) -> None:
    backbone = load_backbone(section(llava, dtype="bfloat16", attn_implementation="eager"))
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}
    assert backbone.model.config._attn_implementation == "eager"


def test_meta_reads_no_weights(llava: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((llava / "config.json").read_text())
    backbone = meta_backbone(section(bare))
    assert {p.device.type for p in backbone.model.parameters()} == {"meta"}
    assert backbone.processor is None and backbone.parts.linears("projector")


def test_missing_folders_and_models(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match="there is no folder") as caught:
        load_backbone(section(tmp_path / "nowhere"))
    assert "allowed a folder, a hub id like ORGANISATION/NAME, shipped:NAME" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        load_backbone(section(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="is not in the hub cache and the hub cannot be reached"):
        load_backbone(section("mmft-tests/no-such-model"))


def test_models_that_read_no_pictures_are_refused(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="is a gpt2 model, not a vision-language model"):
        load_backbone(section(tmp_path))


_TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _others() -> dict[str, transformers.PreTrainedConfig]:
    text = {**_TINY, "vocab_size": 32}
    vision = {**_TINY, "image_size": 8, "patch_size": 4}
    sound = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32, "pad_token_id": 0}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return {
        "CLIPModel": transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8),
        "BertModel": transformers.BertConfig(**text),
        "ViTModel": transformers.ViTConfig(**vision),
        "WhisperForConditionalGeneration": transformers.WhisperConfig(**sound, **heads, **ends),
        "VisionEncoderDecoderModel": transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            transformers.ViTConfig(**vision), transformers.BertConfig(**text)
        ),
    }


@pytest.mark.parametrize("name", list(_others()))
def test_other_models_load_without_a_processor(name: str, tmp_path: Path) -> None:
    config = _others()[name]
    made = getattr(transformers, name)(config)
    made.save_pretrained(tmp_path)
    assert model_class(config) is type(made)
    if name.startswith("Whisper"):  # it writes text: its processor must be there
        with pytest.raises(BackboneError, match="the processor of .* cannot be loaded"):
            load_backbone(section(tmp_path))
    found = load_backbone(section(tmp_path), processor=not name.startswith("Whisper"))
    assert type(found.model) is type(made) and found.processor is None
    for key, value in made.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value)
    with pytest.raises(BackboneError, match="has no processor for pictures and text, only the weights"):
        assert found.tokenizer
    assert meta_backbone(section(tmp_path)).parts.names == found.parts.names


def test_the_class_is_the_one_the_config_names_when_there_is_one() -> None:
    text, vision = {**_TINY, "vocab_size": 32}, {**_TINY, "image_size": 8, "patch_size": 4}
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    assert model_class(config) is transformers.BlipForConditionalGeneration
    config.architectures = ["BlipModel"]
    assert model_class(config) is transformers.BlipModel
    config.architectures = ["LlavaForConditionalGeneration"]  # not a class of this config
    assert model_class(config) is transformers.BlipForConditionalGeneration


def test_a_tokenizer_alone_is_kept_where_no_pictures_are_read(tmp_path: Path) -> None:
    transformers.BertModel(_others()["BertModel"]).save_pretrained(tmp_path)
    tiny_tokenizer("llava").save_pretrained(tmp_path)
    backbone = load_backbone(section(tmp_path))
    assert backbone.tokenizer is backbone.processor and backbone.pad_token_id == 0
    with pytest.raises(BackboneError, match="has no processor for pictures and text, only a"):
        load_processor(section(tmp_path))


def test_code_from_a_folder_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "exotic_vl", "auto_map": {"AutoConfig": "configuration_exotic.ExoticConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_exotic.py").write_text("raise SystemExit('was run')")
    with pytest.raises(BackboneError) as caught:
        load_backbone(section(tmp_path))
    assert "needs code of its own (configuration_exotic.py)" in str(caught.value)
    assert "use a conversion of this model to a native transformers class" in str(caught.value)


def test_pickled_weights_are_refused(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llava / "config.json").read_text())
    with pytest.raises(BackboneError, match="holds no weights"):
        load_backbone(section(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BackboneError, match=r"as a pickle \(pytorch_model\.bin\)") as caught:
        load_backbone(section(tmp_path))
    assert "*.safetensors" in str(caught.value)


def test_truncated_weights_are_an_error(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llava / "config.json").read_text())
    data = (llava / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(BackboneError, match="the weights of .* cannot be loaded"):
        load_backbone(section(tmp_path))


def test_unsupported_attention_names_what_is_supported(llava: Path) -> None:
    with pytest.raises(BackboneError, match="flash_attention_2 cannot be used here") as caught:
        load_backbone(section(llava, attn_implementation="flash_attention_2"))
    assert "do      set model.attn_implementation: sdpa" in str(caught.value)


def test_pad_falls_back_to_the_end_token(llava: Path) -> None:
    backbone = load_backbone(section(llava))
    backbone.tokenizer.pad_token = None
    assert backbone.pad_token_id == 2
    backbone.processor.chat_template = backbone.tokenizer.chat_template = None
    with pytest.raises(BackboneError, match="has no chat template"):
        chat_template(backbone)


def test_a_folder_without_processor(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llava / "config.json").read_text())
    with pytest.raises(BackboneError, match="processor"):
        load_processor(section(tmp_path))


def test_the_fingerprint_sees_every_file_that_matters(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "m", "llava")
    before = fingerprint(folder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(before)
    (folder / "notes.md").write_text("x")
    assert fingerprint(folder) == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))
    after = fingerprint(folder)
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    assert digest(before) != digest(after)
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        fingerprint(tmp_path)


def test_a_weight_that_no_file_holds_is_not_drawn_at_random(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "m", "llava")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "q_proj" in name and "language" in name)
    save_file({name: value for name, value in tensors.items() if name != gone}, folder / "model.safetensors")
    with pytest.raises(BackboneError, match="lacks 1 weights of its model: .*q_proj") as caught:
        load_backbone(section(folder))
    assert "holds every weight" in str(caught.value)
