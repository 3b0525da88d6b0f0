"""The loop: sums over counts, exact resume, frozen parts untouched, non-finite numbers stop before the update."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmft.engine.loop import Engine
from mmft.errors import CheckpointError, MemoryLimitError, NonFiniteError
from mmft.recipe.schema import AdapterSection
from tests.engine.runs import STEPS, Record, StopAt, make_engine

NO_DROPOUT = AdapterSection(targets=("language.attention", "projector"), lora_rank=4)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in engine.params.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, torch.Tensor]:
    engine, _ = make_engine(place, run="whole")
    engine.fit(resume=False)
    return weights(engine)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_stopped_anywhere_resumes_to_the_same_bytes(
    place: Path, whole: dict[str, torch.Tensor], step: int, workers: int
) -> None:
    run = f"stopped-{step}-{workers}"
    engine, _ = make_engine(place, run=run, callbacks=(StopAt(step),), dataloader_num_workers=workers)
    with pytest.raises(KeyboardInterrupt):
        engine.fit(resume=False)
    again, _ = make_engine(place, run=run, dataloader_num_workers=workers)
    state = again.fit(resume=True)
    assert state.step == STEPS
    assert same(weights(again), whole)


def test_resume_without_a_checkpoint_starts_at_the_beginning(place: Path, whole: dict[str, torch.Tensor]) -> None:
    engine, _ = make_engine(place, run="fresh")
    engine.fit(resume=True)
    assert same(weights(engine), whole)


def test_dropout_is_really_on(place: Path, whole: dict[str, torch.Tensor]) -> None:
    quiet = AdapterSection(targets=("language.attention", "language.mlp", "projector"), lora_rank=4)
    engine, _ = make_engine(place, run="quiet", adapter=quiet)
    engine.fit(resume=False)
    assert not same(weights(engine), whole)


def test_a_changed_identity_is_refused(place: Path) -> None:
    engine, _ = make_engine(place, run="identity", save_steps=1, callbacks=(StopAt(2),))
    with pytest.raises(KeyboardInterrupt):
        engine.fit(resume=False)
    other, _ = make_engine(place, run="identity", identity={"recipe": "r", "base": "changed", "data": "d"})
    with pytest.raises(CheckpointError, match="base: b → changed"):
        other.fit(resume=True)


def test_cutting_a_step_into_micro_batches_changes_nothing(place: Path) -> None:
    found = []
    for micro, per_step in ((4, 1), (2, 2), (1, 4)):
        record = Record()
        engine, _ = make_engine(
            place, run=f"cut-{micro}", adapter=NO_DROPOUT, micro=micro, per_step=per_step, callbacks=(record,)
        )
        engine.fit(resume=False)
        found.append([(m["loss"], m["grad_norm"], m["supervised_tokens"]) for m in record.metrics])
    for other in found[1:]:
        for ours, theirs in zip(found[0], other, strict=True):
            # fp32 sums in another order, over six updates that each see the one before.
            assert ours == pytest.approx(theirs, rel=2e-4)


def test_only_adapters_change_and_loss_falls(place: Path) -> None:
    record = Record()
    engine, adapted = make_engine(place, run="frozen", callbacks=(record,))
    frozen = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    before = weights(engine)
    engine.fit(resume=False)
    after = dict(adapted.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert all(param.grad is None for param in after.values() if not param.requires_grad)
    assert not same(before, weights(engine))
    assert record.metrics[-1]["loss"] < record.metrics[0]["loss"]


@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_tower_is_run_once_and_never_backwards(place: Path, recompute: bool) -> None:
    engine, adapted = make_engine(place, run=f"tower-{recompute}", gradient_checkpointing=recompute, save_steps=0)
    tower = adapted.backbone.parts.linears("vision", "mlp")[0]
    layer = dict(adapted.backbone.model.named_modules())[tower]
    calls = {"forward": 0, "graph": 0}

    def count(_: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        calls["forward"] += 1
        calls["graph"] += int(out.requires_grad)

    layer.register_forward_hook(count)
    engine.fit(resume=False)
    assert calls == {"forward": STEPS * 2, "graph": 0}


def test_recomputed_layers_give_the_same_weights(place: Path) -> None:
    found = []
    for recompute in (False, True):
        engine, _ = make_engine(place, run=f"recompute-{recompute}", gradient_checkpointing=recompute, save_steps=0)
        assert bool(engine.recomputed) == recompute
        engine.fit(resume=False)
        found.append(weights(engine))
    assert same(*found)


def test_non_finite_loss_stops_before_the_update(place: Path) -> None:
    engine, adapted = make_engine(place, run="nan")
    broken = next(iter(engine.params.values()))
    before = weights(engine)

    class Poison(StopAt):
        def on_step(self, state, metrics) -> None:
            if state.step == 2:
                with torch.no_grad():
                    broken[0] = float("nan")
                before.clear()
                before.update(weights(engine))

    engine.callbacks = (Poison(-1),)
    with pytest.raises(NonFiniteError, match="at step 3; the weights are those of the step before") as caught:
        engine.fit(resume=False)
    assert "samples " in str(caught.value) and caught.value.exit_code == 5
    now = weights(engine)
    assert all(torch.equal(value.nan_to_num(), now[name].nan_to_num()) for name, value in before.items())


class _PoisonedLoss:
    """An objective whose loss is NaN in chosen forwards (counted over training and evaluation)."""

    def __init__(self, inner: Any, forwards: tuple[int, ...]) -> None:
        self.inner, self.forwards, self.seen = inner, forwards, 0
        self.metrics = inner.metrics

    def count(self, batch: Any) -> float:
        return self.inner.count(batch)

    def loss(self, model: Any, batch: Any) -> Any:
        found = self.inner.loss(model, batch)
        self.seen += 1
        return replace(found, sum=found.sum * float("nan")) if self.seen in self.forwards else found


def _poisoned(engine: Engine, *forwards: int) -> None:
    engine.job = replace(engine.job, objective=_PoisonedLoss(engine.job.objective, forwards))


def test_steps_that_are_not_finite_are_left_out_as_often_as_allowed(place: Path) -> None:
    engine, _ = make_engine(place, run="skips", per_step=4, skip_nonfinite_steps=2)
    _poisoned(engine, 3, 7)  # one micro-batch of four in steps 1 and 2
    before = weights(engine)

    class Look(Record):
        def on_step(self, state, metrics) -> None:
            super().on_step(state, metrics)
            if state.step == 2:
                assert same(weights(engine), before)

    record = Look()
    engine.callbacks = (record,)
    state = engine.fit(resume=False)
    assert state.step == STEPS and state.skipped == 2 and state.samples_consumed == STEPS * 8
    assert [metrics.get("skipped_steps") for metrics in record.metrics] == [1, 2, 2, 2, 2, 2]
    assert not same(weights(engine), before)
    assert all(torch.isfinite(value).all() for value in weights(engine).values())


def test_one_step_more_than_allowed_stops_and_names_its_micro_batch(place: Path) -> None:
    engine, _ = make_engine(place, run="skips-3", per_step=4, skip_nonfinite_steps=2)
    _poisoned(engine, 1, 5, 10)
    with pytest.raises(NonFiniteError, match="at step 3") as caught:
        engine.fit(resume=False)
    named = str(caught.value).split("samples ")[1].splitlines()[0].split(", ")
    assert named == [engine.job.samples[row].id for row, _ in engine.job.plan.micro_batch_at(2, 1).rows]


def test_a_held_out_loss_that_is_not_finite_stops(place: Path) -> None:
    engine, _ = make_engine(place, run="eval-nan", eval_rows=4, eval_steps=1)
    _poisoned(engine, 4)  # two forwards of step 1, then the second of two of the evaluation
    with pytest.raises(NonFiniteError, match="eval loss nan at step 1") as caught:
        engine.fit(resume=False)
    assert "samples " + ", ".join(sample.id for sample in engine.job.eval_samples[2:4]) in str(caught.value)


def test_evaluation_in_the_middle_changes_nothing(place: Path, whole: dict[str, torch.Tensor]) -> None:
    record = Record()
    engine, _ = make_engine(place, run="eval", eval_rows=5, eval_steps=2, callbacks=(record,))
    engine.fit(resume=False)
    assert same(weights(engine), whole)
    assert len(record.evaluations) == 3
    assert record.evaluations[-1] == pytest.approx(engine.evaluate_loss(engine.job.eval_samples), rel=1e-6)


def test_four_bit_base_with_evaluation_trains_as_without(place: Path) -> None:
    found = []
    for steps in (0, 2):
        engine, _ = make_engine(place, run=f"nf4-{steps}", four_bit=True, eval_rows=4, eval_steps=steps)
        assert engine.job.adapted.backbone.quantized
        engine.fit(resume=False)
        found.append(weights(engine))
    assert same(*found)


def test_early_stopping_and_best_weights(place: Path) -> None:
    record = Record()
    engine, _ = make_engine(
        place,
        run="early",
        eval_rows=4,
        eval_steps=1,
        early_stopping_patience=2,
        load_best_model_at_end=True,
        learning_rate=3.0,
        max_grad_norm=0.0,
        callbacks=(record,),
    )
    state = engine.fit(resume=False)
    assert state.stopped == "no better loss in 2 evaluations"
    assert state.best_loss == min(record.evaluations)
    assert engine.evaluate_loss(engine.job.eval_samples) == pytest.approx(state.best_loss, rel=1e-6)


def test_batch_norm_tower_keeps_its_statistics(place: Path) -> None:
    pytest.importorskip("timm", reason="needs the extra mmft[demo]")
    engine, adapted = make_engine(place, run="norm", kind="fast_vlm")
    before = {n: b.clone() for n, b in adapted.model.named_buffers() if "running" in n}
    assert before
    engine.fit(resume=False)
    assert all(torch.equal(value, dict(adapted.model.named_buffers())[name]) for name, value in before.items())


def _small_memory(adapted: Any, most: int) -> Any:
    """Forwards of more than `most` rows find no memory."""

    def refuse(_: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > most:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return adapted.backbone.model.get_output_embeddings().register_forward_pre_hook(refuse)


def test_out_of_memory_goes_on_with_smaller_micro_batches(place: Path) -> None:
    small, _ = make_engine(place, run="small", micro=1, per_step=8)
    small.fit(resume=False)
    record = Record()
    engine, adapted = make_engine(place, run="shrinks", micro=4, per_step=2, eval_rows=5, callbacks=(record,))
    engine.job = replace(engine.job, eval_batch_size=5)
    handle = _small_memory(adapted, 1)
    state = engine.fit(resume=False)
    assert state.halvings == 2 and state.samples_consumed == STEPS * 8 and len(record.metrics) == STEPS
    assert same(weights(engine), weights(small))
    handle.remove()
    assert record.evaluations == [pytest.approx(engine.evaluate_loss(engine.job.eval_samples), rel=1e-6)]


def test_smaller_micro_batches_are_resumed(place: Path) -> None:
    whole = None
    for stop in (-1, 3):
        engine, adapted = make_engine(place, run=f"shrunk{stop}", micro=4, per_step=1, callbacks=(StopAt(stop),))
        handle = _small_memory(adapted, 2)
        if stop > 0:
            with pytest.raises(KeyboardInterrupt):
                engine.fit(resume=False)
            handle.remove()
            engine, _ = make_engine(place, run=f"shrunk{stop}", micro=4, per_step=1)
            assert engine.fit(resume=True).halvings == 1
        else:
            engine.fit(resume=False)
            whole = weights(engine)
    assert whole is not None and same(weights(engine), whole)


def test_out_of_memory_names_the_samples_and_the_remedy(place: Path) -> None:
    engine, adapted = make_engine(place, run="oom")

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = adapted.backbone.model.get_output_embeddings().register_forward_pre_hook(refuse)
    with pytest.raises(MemoryLimitError, match="out of memory at step 1") as caught:
        engine.fit(resume=False)
    handle.remove()
    assert caught.value.exit_code == 6
    assert "halve train.per_device_train_batch_size" in str(caught.value)
