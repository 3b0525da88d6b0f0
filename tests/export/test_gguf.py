"""GGUF: the tensors read back, and transformers' own GGUF reader gets the same logits and tokens from the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from mmft.errors import ExportError
from mmft.export.formats import export_folder
from tests.tiny import save_tiny_vlm

gguf = pytest.importorskip("gguf", reason="extra gguf")

MERGES = (("a", "t"), ("i", "t"), ("w", "h"), ("wh", "at"), ("Ġ", "it"), ("Ġ", "i"), ("Ġi", "s"), ("r", "e"))
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def with_merges(folder: Path) -> Path:
    """The tiny tokenizer has a token per byte; llama.cpp wants a BPE that merges."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    first = max(values["model"]["vocab"].values()) + 1
    values["model"]["merges"] = [list(pair) for pair in MERGES]
    values["model"]["vocab"] |= {"".join(pair): first + index for index, pair in enumerate(MERGES)}
    path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("gguf")
    return {kind: with_merges(save_tiny_vlm(root / kind, kind)) for kind in ("llava", "smolvlm", "fast_vlm")}


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("kind", ["llava", "smolvlm", "fast_vlm"])
def test_another_reader_gets_the_same_logits(kind: str, dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """transformers reads GGUF with code of its own; fp32 is exact, 16 bits equal the model cast to them (vectors stay
    in fp32 in the file, so the reference keeps them too)."""
    report = export_folder(folders[kind], tmp_path / "out", to="gguf", dtype=dtype)
    file = next(name for name in report["files"] if not name.startswith("mmproj"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=file, dtype=torch.float32).eval()
    want = AutoModelForImageTextToText.from_pretrained(folders[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        for value in want.parameters():
            if value.ndim > 1:
                value.copy_(value.to(TYPES[dtype]))
        ids = torch.randint(6, 250, (2, 9), generator=torch.Generator().manual_seed(0))
        assert torch.equal(read(ids).logits, want(input_ids=ids).logits)


def test_the_tokenizer_carries_over(folders: dict[str, Path], tmp_path: Path) -> None:
    report = export_folder(folders["llava"], tmp_path / "out", to="gguf", dtype="float16")
    file = next(name for name in report["files"] if not name.startswith("mmproj"))
    read = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=file)
    want = AutoTokenizer.from_pretrained(folders["llava"])
    text = "what is it? a red circle\nit is at 12"
    assert read(text, add_special_tokens=False).input_ids == want(text, add_special_tokens=False).input_ids
    fields = gguf.GGUFReader(tmp_path / "out" / file).fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == want.eos_token_id
    assert fields["tokenizer.chat_template"].contents() == want.chat_template
    tokens, types = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(types) == 288 and tokens[-1] == "[PAD287]" and types[-1] == 5
    assert types[want.convert_tokens_to_ids("<image>")] == 3


@pytest.mark.parametrize("kind, projector", [("llava", "mlp"), ("smolvlm", "idefics3")])
def test_mmproj(kind: str, projector: str, folders: dict[str, Path], tmp_path: Path) -> None:
    report = export_folder(folders[kind], tmp_path / "out", to="gguf", dtype="float16")
    reader = gguf.GGUFReader(tmp_path / "out" / report["mmproj"])
    assert reader.fields["clip.projector_type"].contents() == projector
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    model = AutoModelForImageTextToText.from_pretrained(folders[kind], dtype=torch.float32).model
    tower = model.vision_tower if kind == "llava" else model.vision_model
    layer = tower.encoder.layers[1]
    for name, want in (
        ("v.blk.1.attn_q.weight", layer.self_attn.q_proj.weight),
        ("v.blk.1.ffn_up.weight", layer.mlp.fc1.weight),
        ("v.blk.1.ffn_down.bias", layer.mlp.fc2.bias),
        ("v.position_embd.weight", tower.embeddings.position_embedding.weight),
        ("v.patch_embd.weight", tower.embeddings.patch_embedding.weight),
    ):
        kept = want.dim() == 1 or "embd" in name
        assert found[name].dtype == (torch.float32 if kept else torch.float16)
        assert torch.equal(found[name].float(), want.float() if kept else want.half().float())
    if kind == "llava":
        assert torch.equal(found["mm.2.bias"], model.multi_modal_projector.linear_2.bias)
        # the tiny config takes hidden_states[-1]: what is left after both layers
        assert reader.fields["clip.vision.feature_layer"].contents() == [2]


def test_what_cannot_be_written_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    report = export_folder(folders["fast_vlm"], tmp_path / "out", to="gguf")
    assert report["mmproj"] is None and report["type"] == "F32"
    assert "no mmproj: the tower and projector of fast_vlm are not known here" in report["notes"][-1]
    for kind in ("qwen2_vl", "mllama"):
        with pytest.raises(ExportError, match="cannot be written as GGUF") as caught:
            export_folder(save_tiny_vlm(tmp_path / kind, kind), tmp_path / "no", to="gguf")
        assert "llama, mistral, qwen2, qwen3" in str(caught.value)
        assert not (tmp_path / "no").exists()


def test_tokenizers_that_cannot_be_written(tmp_path: Path) -> None:
    folder = save_tiny_vlm(tmp_path / "llava", "llava")
    with pytest.raises(ExportError, match="has no merges"):
        export_folder(folder, tmp_path / "no", to="gguf")
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**values, "model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ExportError, match="a Unigram tokenizer cannot be written as GGUF"):
        export_folder(folder, tmp_path / "no", to="gguf")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"has no tokenizer\.json"):
        export_folder(folder, tmp_path / "no", to="gguf")
    assert not (tmp_path / "no").exists()


def test_values_that_float16_cannot_hold(folders: dict[str, Path], tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folders["llava"])
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "big")
    for file in folders["llava"].glob("tokenizer*"):
        (tmp_path / "big" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ExportError, match="holds values that float16 cannot"):
        export_folder(tmp_path / "big", tmp_path / "no", to="gguf", dtype="float16")
    assert not (tmp_path / "no").exists()
