"""The kernels in a run: put in and taken out, its loss and gradients, whole runs twice, killed, resumed, verified."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mmft
from mmft.fast import fused_norms, lora_fused, native_build, native_kernels, native_rows, packed_attention
from mmft.fast.plan import NotHere, fast_plan
from mmft.fast.products import configs_of
from tests.fast.helpers import batches, distance, gradients, put_in, workplace
from tests.fast.native import needs_kernels
from tests.runs import TRAIN_ONLY, Stable, adapter_sha, cli, read_lines, wait_for_step, workshop, write_recipe

pytestmark = needs_kernels
CACHE = "cache-native"
RUN = {**TRAIN_ONLY, "adapter.lora_dropout": 0.0, "adapter.targets": ["language.attention", "language.mlp"]}
RUN |= {
    "model.dtype": "bfloat16",
    "train.bf16": True,
    "train.effective_batch_size": 8,
    "train.per_device_train_batch_size": 4,
}


@pytest.fixture(scope="module", autouse=True)
def faster() -> Iterator[None]:
    """The kernel wins its race, which is kept in the cache for other processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFT_CACHE", str(workshop() / CACHE))
        patch.setattr(native_kernels, "race", lambda *_: (2.0, 1.0))
        yield


@pytest.fixture(autouse=True)
def nothing_chosen():
    yield
    assert native_build.choose(None) is None, "a run left its kernels behind"


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls of each kernel from now on."""
    found: dict[str, int] = {}

    class Counting:
        def __getattr__(self, name: str):
            found[name] = found.get(name, 0) + 1
            return getattr(library, name)

    library = native_build.library()
    monkeypatch.setattr(native_build, "library", Counting)
    return found


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16() if x.is_floating_point() else x


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_vl"])
def test_a_run_is_no_further_from_float32_than_without(tmp_path, monkeypatch, kind):
    engine, setting, work = workplace(tmp_path, kind=kind, bf16=True)
    (batch,) = batches(engine)
    model, exact = setting.adapted.backbone.model, gradients(work, batch)
    for name, value in model.named_parameters():  # as it lies in memory: states between layers are in bfloat16 then
        value.data = value.data if value.requires_grad else value.data.bfloat16()
        assert value.requires_grad == ("lora_" in name)
    batch = replace(batch, inputs={name: _half(value) for name, value in batch.inputs.items()})
    plain = gradients(work, batch, bf16=True)
    before = {name: one._attn_implementation for name, one in configs_of(model).items()}
    calls = counted(monkeypatch)
    work = put_in(setting, work, lora_fused.CANDIDATE, fused_norms.CANDIDATE, native_kernels.CANDIDATE)
    assert model.config.get_text_config()._attn_implementation == native_kernels.NAME
    assert any(hasattr(one, "mmft_mlp") for one in model.modules()), "the tower's blocks"
    ours = gradients(work, batch, bf16=True)
    assert {"mmft_attend", "mmft_attend_back", "mmft_attend_sum", "mmft_norm", "mmft_norm_back"} <= calls.keys()
    assert {"mmft_lines", "mmft_lines_back", "mmft_gated", "mmft_gated_back"} <= calls.keys()
    # Over eight draws of the weights the mean of this ratio is 0.97; one draw alone goes by chance up to 1.25.
    assert distance(ours[1], exact[1]) <= 1.3 * distance(plain[1], exact[1])
    assert abs(ours[0] - exact[0]) <= 1.5 * abs(plain[0] - exact[0]) + 1e-3 * exact[0]
    work.release()
    assert not any(hasattr(one, "mmft_mlp") for one in model.modules())
    assert {name: one._attn_implementation for name, one in configs_of(model).items()} == before
    assert native_build.chosen() is None and gradients(work, batch, bf16=True)[0] == plain[0]


def test_float32_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    _, setting, _ = workplace(tmp_path)
    (row,) = fast_plan(setting, [native_kernels.CANDIDATE]).rows
    assert not row.on and row.reason == "the kernels compute in bfloat16"
    mmft.train(write_recipe(tmp_path, {**RUN, "train.bf16": False, "train.max_steps": 1}), quiet=True)
    found = (tmp_path / "cache" / "kernels").glob("*")  # tensors in blocks are for every type
    assert not [one for one in found if not one.name.startswith("blocks-")]
    setting.adapted.backbone.model.bfloat16()
    assert fast_plan(setting, [native_kernels.CANDIDATE]).on("native_kernels")


class _NoHeads:
    def get_text_config(self) -> object:
        return object()


def test_where_it_is_not_put_in_the_model_is_as_it_was(tmp_path, monkeypatch):
    _, setting, work = workplace(tmp_path, bf16=True)
    model = setting.adapted.backbone.model
    before = {name: one._attn_implementation for name, one in configs_of(model).items()}
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native_kernels, "race", lambda *_: (1.0, 0.9))
    for config, reason in ((model.config, "1000.0 ms as it is, and 900.0 ms"), (_NoHeads(), "tells no heads")):
        monkeypatch.setattr(model, "config", config)
        with pytest.raises(NotHere, match=reason):
            native_kernels.install(setting, work)
        assert native_build.chosen() is None
    monkeypatch.undo()
    assert {name: one._attn_implementation for name, one in configs_of(model).items()} == before
    assert not fast_plan(replace(setting, sharded=True), [native_kernels.CANDIDATE]).rows[0].on


def test_heads_that_are_no_vectors_are_told(tmp_path):
    _, setting, _ = workplace(tmp_path, bf16=True)
    text = setting.adapted.backbone.model.config.get_text_config()
    native_build.choose(native_build.library())
    try:
        assert all(seconds > 0 for seconds in RACE(text, length=16))
        text.head_dim = 24
        with pytest.raises(NotHere, match="heads of width 24"):
            RACE(text, length=16)
    finally:
        native_build.choose(None)


RACE = native_kernels.race


@pytest.fixture(scope="module")
def whole(faster) -> Path:
    """A run in bfloat16 with all optimisations."""
    folder = workshop() / "native"
    mmft.train(write_recipe(folder, RUN), quiet=True)
    return folder / "runs" / "tiny"


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_lines(run / "metrics.jsonl") if "loss" in row]


def test_a_run_calls_the_kernels_and_again_gives_the_same_bytes(tmp_path, monkeypatch, whole):
    calls, lines = counted(monkeypatch), []
    before = packed_attention.native_line
    monkeypatch.setattr(packed_attention, "native_line", lambda *rows, **how: lines.append(1) or before(*rows, **how))
    mmft.train(write_recipe(tmp_path, RUN), quiet=True)
    run = tmp_path / "runs" / "tiny"
    assert (
        lines
        and calls["mmft_attend_back"]
        and calls["mmft_gated_back"]
        and calls["mmft_loss"]
        and calls["mmft_norm_back"]
    )
    assert adapter_sha(run) == adapter_sha(whole) and losses(run) == losses(whole)


def test_killed_and_resumed_it_is_the_same_and_not_across_the_switch(tmp_path, whole):
    path, run, own = write_recipe(tmp_path, RUN), tmp_path / "runs" / "tiny", Stable()
    try:
        pid = own.start("train", path, "--quiet", log=tmp_path / "log")
        wait_for_step(run, 4)
        os.kill(pid, signal.SIGKILL)
        assert own.wait(pid) == -signal.SIGKILL
    finally:
        own.close()
    names = [row[0] for row in mmft.plan(str(path))["fast"] if row[1] == "on" and row[0] != "native_kernels"]
    outcome = cli("train", path, f"train.fast=[{','.join(names)}]", "--resume")
    assert outcome.code and "fast: " in outcome.err and "native_kernels" in outcome.err
    mmft.train(path, resume=True, quiet=True)
    assert adapter_sha(run) == adapter_sha(whole) and losses(run) == losses(whole)


def test_without_a_compiler_a_run_trains_by_torch(tmp_path, monkeypatch, whole):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write_recipe(tmp_path, {**RUN, "train.max_steps": 2})
    row = next(row for row in mmft.plan(str(path))["fast"] if row[0] == "native_kernels")
    assert row[1:3] == ["off", "there is no gcc to build them with"]
    mmft.train(path, quiet=True)
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(losses(whole)[:2], rel=0.02)  # bfloat16


def test_verify_fast(tmp_path):
    found = cli("verify-fast", write_recipe(tmp_path, RUN), "--batches", 2, "--json").json()
    half = found["precisions"]["bfloat16"]
    assert found["ok"] and "native_kernels" in half["all"]["on"]
    assert half["native_kernels"]["on"] == ["native_kernels"]
    assert 0 < half["native_kernels"]["gradients"] <= half["native_kernels"]["allowed"]
    assert "native_kernels" not in found["precisions"]["float32"]
    assert torch.get_num_threads() == 1 and native_rows.chosen() is None
