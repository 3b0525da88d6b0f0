"""ONNX graphs of encoders: equal to torch in onnxruntime for batches and lengths that were not traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from mmft.errors import ExportError
from mmft.export import onnx
from mmft.export.formats import export_folder
from mmft.export.merge import merge_adapter
from tests.export import zoo
from tests.tiny import save_tiny_vlm

onnxruntime = pytest.importorskip("onnxruntime", reason="extra onnx")
pytest.importorskip("onnx", reason="extra onnx")
pytest.importorskip("onnxscript", reason="extra onnx")

BODY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**BODY, "vocab_size": 99, "max_position_embeddings": 40, "eos_token_id": 98, "bos_token_id": 97}
EYE = {**BODY, "image_size": 28, "patch_size": 14}


def clip() -> transformers.PreTrainedModel:
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=EYE, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip() -> transformers.PreTrainedModel:
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=EYE)
    )


def wav2vec2() -> transformers.PreTrainedModel:
    extra = {
        "conv_dim": [16, 16, 16],
        "conv_kernel": [10, 3, 3],
        "conv_stride": [5, 4, 4],
        "num_feat_extract_layers": 3,
    }
    config = transformers.Wav2Vec2Config(**BODY, **extra, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
    return transformers.Wav2Vec2Model(config)


def clap() -> transformers.PreTrainedModel:
    ear = {
        "spec_size": 32,
        "num_mel_bins": 16,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "hidden_size": 32,
        "window_size": 4,
        "aff_block_r": 2,
    }
    return transformers.ClapModel(
        transformers.ClapConfig(text_config={**TEXT, "eos_token_id": 2}, audio_config=ear, projection_dim=16)
    )


ENCODERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**EYE)),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**BODY, vocab_size=99)),
}
SLOW_ENCODERS = {
    "siglip": siglip,
    "wav2vec2": wav2vec2,
    "clap": clap,
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**EYE)),
}


def save(folder: Path, make: Callable[[], transformers.PreTrainedModel]) -> Path:
    torch.manual_seed(0)
    make().eval().save_pretrained(folder)
    return folder


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("kind", [*ENCODERS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_ENCODERS)])
def test_encoders(kind: str, tmp_path: Path) -> None:
    folder = save(tmp_path / kind, {**ENCODERS, **SLOW_ENCODERS}[kind])
    report = export_folder(folder, tmp_path / "out", to="onnx")
    media = {"siglip": "image", "clap": "audio"}.get(kind)
    assert set(report["graphs"]) == ({media, "text", "model"} if media else {"model"})
    for graph in report["graphs"].values():
        assert graph["relative"] <= onnx.TOLERANCE
        assert all(shape[0] in ("batch", "media") for shape in graph["inputs"].values())


def test_clip_with_a_merged_adapter(tmp_path: Path) -> None:
    """The graphs compute what the adapter model computes, for a batch, length and padding that were not traced."""
    base = save(tmp_path / "clip", clip)
    model = transformers.CLIPModel.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "visual_projection"])).eval()
    zoo.randomize(tuned, 1)
    tuned.save_pretrained(tmp_path / "adapter")
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    export_folder(tmp_path / "merged", tmp_path / "out", to="onnx")
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 90, (4, 13), generator=generator)
    ids[:, -1] = 98
    mask = torch.ones_like(ids)
    ids[2, 5], mask[2, 6:] = 98, 0
    pixels = torch.randn(5, 3, 28, 28, generator=generator)
    with torch.no_grad():
        want = tuned(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        plain = transformers.CLIPModel.from_pretrained(base)(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "pixel_values": pixels.numpy()}
    got = session(tmp_path / "out/model.onnx").run(["logits_per_image"], feeds)[0]
    assert got.shape == (5, 4)
    # The similarity is scaled by 14: 1e-3 is 1e-4 of it, fp32 in another order; the adapter changes far more.
    numpy.testing.assert_allclose(got, want.logits_per_image.numpy(), atol=1e-3)
    assert float((plain.logits_per_image - want.logits_per_image).abs().max()) > 0.1
    text = session(tmp_path / "out/text.onnx").run(None, {k: v for k, v in feeds.items() if k != "pixel_values"})[0]
    image = session(tmp_path / "out/image.onnx").run(None, {"pixel_values": pixels.numpy()})[0]
    for tower, embeds in ((text, want.text_embeds), (image, want.image_embeds)):
        unit = tower / numpy.linalg.norm(tower, axis=-1, keepdims=True)
        numpy.testing.assert_allclose(unit, embeds.numpy(), atol=1e-5)


def test_a_wrong_graph_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check compares: weights that change between trace and check are found, and nothing is left."""
    folder = save(tmp_path / "vit", ENCODERS["vit"])
    write = onnx._write

    def spoilt(graph: onnx._Graph, path: Path) -> None:
        write(graph, path)
        with torch.no_grad():
            next(iter(graph.module.parameters())).mul_(-1.0)

    monkeypatch.setattr(onnx, "_write", spoilt)
    with pytest.raises(ExportError, match="model in onnxruntime differs from torch by"):
        export_folder(folder, tmp_path / "out", to="onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"vit"}


def test_models_that_generate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="LlavaForConditionalGeneration generates text") as caught:
        export_folder(save_tiny_vlm(tmp_path / "llava", "llava"), tmp_path / "out", to="onnx")
    assert "encoders and dual encoders" in str(caught.value) and "--to gguf" in str(caught.value)
    with pytest.raises(ExportError, match="written in float32, not float16"):
        export_folder(save(tmp_path / "vit", ENCODERS["vit"]), tmp_path / "out", to="onnx", dtype="float16")
    assert not (tmp_path / "out").exists()
