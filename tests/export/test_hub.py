"""The model card, and an upload over real HTTP to a small hub on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmft.errors import ExportError
from mmft.export.hub import model_card, push_folder
from mmft.recipe.load import dump_recipe, recipe_digest
from mmft.recipe.schema import Recipe
from tests.tiny import save_tiny_vlm

SCORE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run folder, as far as the card reads it."""
    folder = tmp_path / "runs" / "colours"
    save_tiny_vlm(folder / "merged", "llava")
    (folder / "merged/merge_report.json").write_text(json.dumps({"base": "a-folder-of-this-machine"}))
    (folder / "merged/README.md").write_text("---\nlicense: apache-2.0\n---\nThe base's own card.\n")
    values = {
        "name": "colours",
        "model": {"name_or_path": "org/base-vlm"},
        "adapter": {"targets": ["language.attention", "projector"]},
        "data": {"train": [{"path": str(tmp_path / "secret" / "rows.jsonl")}]},
    }
    (folder / "recipe.yaml").write_text(dump_recipe(Recipe.model_validate(values)))
    report = {"sets": {"held-out": {"scores": {"adapter": {"exact_match": SCORE}}}}}
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def test_card(run: Path) -> None:
    card = model_card(run)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base-vlm",
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": ["mmft", "lora"],
    }
    assert "| held-out | exact_match | adapter | 0.500 [0.250, 0.750] | 12 |" in body
    recipe = Recipe.model_validate(yaml.safe_load((run / "recipe.yaml").read_text()))
    assert recipe_digest(recipe) in body
    assert "language.attention, projector" in body
    assert str(run.parent.parent) not in card


def test_card_keeps_local_folders_to_itself(run: Path) -> None:
    text = (run / "recipe.yaml").read_text().replace("org/base-vlm", str(run / "merged"))
    (run / "recipe.yaml").write_text(text)
    (run / "merged/README.md").unlink()
    card = model_card(run)
    assert "base_model" not in card and str(run) not in card and "Base model: merged." in card
    assert "The licence of the base model applies" in card


class _Hub(BaseHTTPRequestHandler):
    """The four addresses an upload of small files speaks to; what was sent is kept on the server."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((self.path, self.headers.get("authorization")))
        base = f"http://127.0.0.1:{self.server.server_port}"
        if self.server.refuse:
            self._answer({"error": "You don't have the rights to create a model"}, code=403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{base}/me/colours", "name": "me/colours", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {"commitUrl": f"{base}/me/colours/commit/abc", "commitOid": "abc", "pullRequestUrl": None}
            self._answer({**answer, "success": True})
        else:
            self._answer({"error": self.path}, code=404)

    def _answer(self, value: Any, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.asked, server.created, server.files, server.refuse = [], [], {}, False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(run: Path, hub: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """`mmft push` in a process of its own: huggingface_hub reads its environment when it is imported."""
    address = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_" + "x" * 34,
        "HF_HUB_OFFLINE": "0",
    }
    words = [sys.executable, "-m", "mmft", "push", str(run), "me/colours", "--private", "--json"]
    return subprocess.run(
        words, env={**os.environ, **address, **environment}, capture_output=True, text=True, timeout=120
    )


def test_push(run: Path, hub: Any) -> None:
    done = push(run, hub)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"].endswith("/me/colours/commit/abc")
    assert hub.created[0]["name"] == "colours" and hub.created[0]["visibility"] == "private"
    sent = {name: data for name, data in hub.files.items() if name != "README.md"}
    names = {path.name for path in (run / "merged").iterdir()} - {"README.md", "merge_report.json"}
    assert sent.keys() == names
    assert all(data == (run / "merged" / name).read_bytes() for name, data in sent.items())
    assert hub.files["README.md"].decode() == model_card(run)
    assert all(token and token.startswith("Bearer hf_x") for _, token in hub.asked if "validate" not in _)


def test_a_hub_that_refuses(run: Path, hub: Any) -> None:
    hub.refuse = True
    done = push(run, hub)
    assert done.returncode == 9 and "the hub refused me/colours" in done.stderr and "hf auth login" in done.stderr
    assert not hub.files and "Traceback" not in done.stderr


def test_offline(run: Path, hub: Any) -> None:
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = push(run, hub, **environment)
        assert done.returncode == 9 and "the hub cannot be reached" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not hub.asked


def test_what_is_not_pushed(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'colours' is not the name of a repository"):
        push_folder(run, "colours")
    with pytest.raises(ExportError, match="neither a run nor a model nor an adapter folder"):
        push_folder(tmp_path, "me/colours")
    (run / "merged").rename(run / "elsewhere")
    with pytest.raises(ExportError, match="has no result yet"):
        push_folder(run, "me/colours")
