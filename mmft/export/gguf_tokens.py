"""A `tokenizer.json` as the vocabulary of a GGUF file.

llama.cpp has its own tokenizers. Byte-level BPE (`gpt2`) carries over with its merges if the way the text is cut
before merging is one that llama.cpp knows by name; BPE with byte fallback (`llama`, from SentencePiece) carries over
by scores that follow the merge ranks. Other models (Unigram, WordPiece) are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmft.errors import ExportError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_CUTS = (
    # A piece of the regular expression that cuts the text -> llama.cpp's name of it.
    (r"\p{N}{1,3}", "llama-bpe"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
)


def add_tokenizer(writer: Any, folder: Path, *, rows: int) -> dict[str, Any]:
    """Write tokens, types, merges or scores, special ids and the chat template; returns the kind and what is doubtful.

    `rows` is the number of embedding rows, up to which the vocabulary is padded. Raises ExportError when there is no
    tokenizer.json, or it is of a kind llama.cpp has no reader for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ExportError(
            f"{folder.name} has no tokenizer.json",
            where=str(folder),
            do="load the tokenizer in transformers and save it (save_pretrained writes tokenizer.json)",
        )
    whole = json.loads(path.read_text(encoding="utf-8"))
    model = whole["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"a {model.get('type')} tokenizer cannot be written as GGUF",
            where=str(path),
            allowed="BPE, byte-level or with byte fallback",
            do="use llama.cpp's own convert_hf_to_gguf.py, which reads the SentencePiece file",
        )
    if not model.get("merges"):
        raise ExportError(
            "the tokenizer has no merges, and llama.cpp loads no BPE without them",
            where=str(path),
            do="give the tokenizer.json that save_pretrained writes",
        )
    tokens, types = _tokens(model, whole.get("added_tokens") or [], rows, path)
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    notes: list[str] = []
    if model.get("byte_fallback"):
        kind, cut = "llama", "default"
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(pairs):
            ranks.setdefault("".join(pair), rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(ranks.get(token, len(pairs))) for token in tokens])
    else:
        kind, cut = "gpt2", _cut(whole)
        if cut == "default":
            notes.append("llama.cpp has no name known here for how this tokenizer cuts text; it may cut differently")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut)
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_token_types(types)
    _special(writer, folder, {token: index for index, token in enumerate(tokens)})
    return {"tokenizer": kind, "pre_tokenizer": cut, "tokens": len(tokens), "notes": notes}


def _tokens(model: dict[str, Any], added: list[dict[str, Any]], rows: int, path: Path) -> tuple[list[str], list[int]]:
    ids: dict[int, str] = {index: token for token, index in model["vocab"].items()}
    kinds = {}
    for extra in added:
        ids[extra["id"]] = extra["content"]
        kinds[extra["id"]] = _CONTROL if extra.get("special") else _USER
    if max(ids) >= rows:
        raise ExportError(
            f"the tokenizer has {max(ids) + 1} tokens, the model only {rows} embedding rows",
            where=str(path),
            do="give the tokenizer that belongs to the model",
        )
    tokens, types = [], []
    for index in range(rows):
        token = ids.get(index)
        kind = kinds.get(index, _NORMAL if token is not None else _UNUSED)
        if token is not None and token == model.get("unk_token"):
            kind = _UNKNOWN
        elif token is not None and model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kind = _BYTE
        tokens.append(f"[PAD{index}]" if token is None else token)
        types.append(kind)
    return tokens, types


def _cut(whole: dict[str, Any]) -> str:
    before = json.dumps(whole.get("pre_tokenizer") or {}, ensure_ascii=False)
    for piece, name in _CUTS:
        if json.dumps(piece, ensure_ascii=False)[1:-1] in before:
            return name
    return "gpt-2" if '"ByteLevel"' in before and '"Split"' not in before else "default"


def _special(writer: Any, folder: Path, ids: dict[str, int]) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    for name in ("bos", "eos"):
        if isinstance(config.get(f"add_{name}_token"), bool):
            getattr(writer, f"add_add_{name}_token")(config[f"add_{name}_token"])
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    elif isinstance(config.get("chat_template"), str):
        writer.add_chat_template(config["chat_template"])
