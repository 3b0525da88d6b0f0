"""The loop: sums over counts, exact resume, frozen parts untouched, non-finite numbers stop before the update."""

from __future__ import annotations

from pathlib import Path

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
