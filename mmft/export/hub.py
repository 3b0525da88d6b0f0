"""A finished run on the Hugging Face hub: a model card made from the run, and the upload."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mmft.errors import CheckpointError, ExportError
from mmft.files import read_json_file
from mmft.recipe.load import recipe_digest
from mmft.recipe.schema import Recipe

_NOT_PUSHED = ("MANIFEST.json", "merge_report.json", "README.md")
"""Reports that name folders of this machine, and the base's card, in whose place the run's own is put."""


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False) -> dict[str, Any]:
    """Upload a run's result (`merged/`, else `model/`, else `adapter/`), a model or an adapter folder to the hub.

    One commit with all files and a README.md (`model_card`); the token is the one `hf auth login` has stored, or
    HF_TOKEN. Returns the address of the commit and the files. Raises ExportError offline, without permission, or when
    the hub refuses; nothing is created on the hub before the card and the list of files are ready.
    """
    source = pushed_folder(Path(folder))
    card = model_card(Path(folder))
    files = [path for path in _files(source) if path.name not in _NOT_PUSHED]
    if "/" not in repo_id or repo_id.count("/") != 1:
        raise ExportError(
            f"{repo_id!r} is not the name of a repository",
            where="REPO_ID",
            allowed="ORGANISATION/NAME or USER/NAME",
            do="give both parts",
        )
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    operations = [CommitOperationAdd("README.md", io.BytesIO(card.encode()))]
    operations += [CommitOperationAdd(path.relative_to(source).as_posix(), str(path)) for path in files]
    api = HfApi(library_name="mmft")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.create_commit(repo_id, operations, commit_message=f"Upload {source.name} with mmft")
    except (HfHubHTTPError, LocalTokenNotFoundError, HFValidationError, ValueError) as error:
        raise ExportError(
            f"the hub refused {repo_id}: {_first(error)}",
            where=api.endpoint,
            do="log in (hf auth login) with a token that may write to this repository, and check its name",
        ) from error
    except (HTTPError, ConnectionError) as error:  # also HF_HUB_OFFLINE
        raise ExportError(
            f"the hub cannot be reached: {_first(error)}",
            where=api.endpoint,
            do="unset HF_HUB_OFFLINE, check the network, and push again; nothing was uploaded",
        ) from error
    return {
        "url": str(commit.commit_url),
        "repo": repo_id,
        "files": ["README.md", *(op.path_in_repo for op in operations[1:])],
    }


def pushed_folder(folder: Path) -> Path:
    """The folder whose files are uploaded. Raises ExportError when there is nothing to upload."""
    if (folder / "recipe.yaml").is_file():
        for name in ("merged", "model", "adapter"):
            if (folder / name).is_dir():
                return folder / name
        raise ExportError(f"the run {folder.name} has no result yet", where=str(folder), do="train it to its end")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ExportError(
            f"{folder} is neither a run nor a model nor an adapter folder", where=str(folder), do="check the path"
        )
    return folder


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def model_card(folder: Path) -> str:
    """README.md of a run (or of a model or adapter folder, about which less is known): front matter, what was trained
    on what, the digest of the recipe, and the scores with their intervals. Names of local folders stay out of it."""
    source = pushed_folder(folder)
    run = folder if (folder / "recipe.yaml").is_file() else None
    facts = _facts(run, source)
    front = {
        "library_name": "peft" if (source / "adapter_config.json").is_file() else "transformers",
        "tags": ["mmft", *(["lora"] if facts.get("method") not in (None, "full") else [])],
    }
    if facts.get("base") and not facts["local"]:
        front["base_model"] = facts["base"]
    if licence := _licence(source):
        front["license"] = licence
    lines = ["---", yaml.safe_dump(front, sort_keys=True).strip(), "---", "", f"# {facts['name']}", ""]
    lines.append(f"Base model: {facts['base']}." if facts.get("base") else "The base model is not recorded.")
    if run is not None:
        lines += [
            f"Method: {facts['method']} on {', '.join(facts['targets'])}.",
            f"Recipe digest: `{facts['digest']}` (mmft).",
        ]
        lines += ["", *_scores(run)]
    if not licence:
        lines += ["", "The licence of the base model applies; it is not recorded in its folder."]
    return "\n".join(lines).rstrip() + "\n"


def _facts(run: Path | None, source: Path) -> dict[str, Any]:
    if run is None:
        name = _json(source / "adapter_config.json").get("base_model_name_or_path") or ""
        base, local = _public(str(name))
        return {"name": source.resolve().name, "base": base, "local": local}
    try:  # not by load_recipe, which wants the data to be there still
        recipe = Recipe.model_validate(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ExportError(
            f"the run's recipe cannot be read: {_first(error)}", where=str(run / "recipe.yaml"), do="restore it"
        ) from error
    base, local = _public(recipe.model.name_or_path)
    return {
        "name": recipe.name,
        "base": base,
        "local": local,
        "method": recipe.adapter.method,
        "targets": list(recipe.adapter.targets),
        "digest": recipe_digest(recipe),
    }


def _public(name: str) -> tuple[str, bool]:
    """A base's name as others may read it, and whether it is no hub id."""
    local = name.startswith(("/", ".", "~", "shipped:")) or name.count("/") != 1 or Path(name).is_dir()
    return (Path(name).name if local and not name.startswith("shipped:") else name), local


def _licence(source: Path) -> str | None:
    """The `license` of the card that came with the base's files."""
    path = source / "README.md"
    if not path.is_file():
        return None
    parts = path.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _scores(run: Path) -> list[str]:
    sets = _json(run / "report.json").get("sets") or {}
    rows = []
    for name, one in sets.items():
        for model, metrics in one.get("scores", {}).items():
            for metric, score in metrics.items():
                value = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
                rows.append(f"| {name} | {metric} | {model} | {value} | {score['n']} |")
    if not rows:
        return ["The run was not evaluated."]
    head = ["## Scores", "", "95 % bootstrap intervals.", "", "| set | metric | model | score | rows |"]
    return [*head, "|---|---|---|---|---|", *rows]


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_file(path) if path.is_file() else {}
    except CheckpointError:
        return {}


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
