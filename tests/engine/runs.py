"""Tiny runs for the engine's tests: a llava of a few thousand weights on made-up coloured pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmft.adapters.build import Adapted, build_adapters
from mmft.backbones.load import Backbone, load_backbone
from mmft.data.formats import load_all
from mmft.data.order import StepPlan
from mmft.data.render import Renderer
from mmft.engine.loop import Engine, TrainJob
from mmft.engine.state import TrainState
from mmft.journal import Journal
from mmft.objectives.build import build_sft
from mmft.recipe.schema import (
    AdapterSection,
    DataSection,
    DataSource,
    ModelSection,
    ObjectiveSection,
    QuantizationSection,
    TrainSection,
)
from tests.tiny import save_tiny_vlm, tiny_rows

STEPS = 6


class StopAt:
    """A callback that ends the process's work the hard way after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_start(self, state: TrainState, total_steps: int) -> None: ...

    def on_step(self, state: TrainState, metrics: dict[str, float]) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None: ...

    def on_save(self, state: TrainState, folder: Path) -> None: ...

    def on_end(self, state: TrainState) -> None: ...


class Record(StopAt):
    """A callback that keeps all metrics."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.metrics: list[dict[str, float]] = []
        self.evaluations: list[float] = []

    def on_step(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.metrics.append(dict(metrics))

    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None:
        self.evaluations.append(metrics["eval_loss"])


def tiny_backbone(folder: Path, kind: str = "llava", *, four_bit: bool = False) -> Backbone:
    """A tiny backbone loaded from disk in fp32 (4-bit: as transformers would)."""
    model = folder / f"model-{kind}"
    if not model.exists():
        save_tiny_vlm(model, kind)
    section = ModelSection(name_or_path=str(model), dtype="float32")
    return load_backbone(section, QuantizationSection(load_in_4bit=four_bit, bnb_4bit_compute_dtype="float32"))


def make_engine(
    folder: Path,
    *,
    run: str = "run",
    callbacks: tuple[Any, ...] = (),
    adapter: AdapterSection | None = None,
    four_bit: bool = False,
    eval_rows: int = 0,
    kind: str = "llava",
    identity: dict[str, Any] | None = None,
    micro: int = 2,
    per_step: int = 2,
    **train: Any,
) -> tuple[Engine, Adapted]:
    """An engine over 16 rows; dropout is on unless the adapter section says otherwise."""
    backbone = tiny_backbone(folder, kind, four_bit=four_bit)
    section = adapter or AdapterSection(
        targets=("language.attention", "language.mlp", "projector"), lora_rank=4, lora_dropout=0.1
    )
    adapted = build_adapters(backbone, section, seed=0)
    rows = folder / "data"
    if not rows.exists():
        tiny_rows(rows, 16)
    source = DataSource(path=str(rows / "rows.jsonl"))
    samples = load_all((source,), DataSection(train=(source,)), 0)
    values = {"bf16": False, "learning_rate": 1e-2, "save_steps": 2, "logging_steps": 1, **train}
    journal = Journal(None, quiet=True)
    job = TrainJob(
        adapted=adapted,
        objective=build_sft(ObjectiveSection(), adapted.model),
        samples=samples,
        eval_samples=samples[:eval_rows],
        renderer=Renderer(backbone.processor, max_length=512),
        plan=StepPlan(rows=len(samples), micro_batch=micro, micro_per_step=per_step, seed=0),
        total_steps=STEPS,
        eval_batch_size=2,
        section=TrainSection(**values),
        folder=folder / run,
        identity=identity or {"recipe": "r", "base": "b", "data": "d"},
    )
    engine = Engine(job, accelerator=Accelerator(cpu=True), journal=journal, callbacks=callbacks)
    return engine, adapted
