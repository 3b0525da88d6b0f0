"""The one training loop: batches → losses → one update, under accelerate.

The loop knows an objective only as `loss(model, batch) -> Loss(sum, count)`, or where a loss is no sum over
micro-batches as `backward(model, micro-batches)`. It divides by the count of the whole
optimizer step (all micro-batches, all ranks), seeds dropout by (seed, step, micro-batch) so that neither resume nor
the number of processes changes a number, and stops before an update that is not finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmft.adapters.build import set_modes
from mmft.data.collate import Batch
from mmft.data.loader import batches
from mmft.data.order import StepPlan
from mmft.data.sample import Sample
from mmft.data.streaming import Streamed
from mmft.engine.callbacks import Callback
from mmft.engine.checkpoint import checkpoint_folder, load_checkpoint, newest_valid, require_room, save_checkpoint
from mmft.engine.guards import StopSignals, everywhere, not_finite
from mmft.engine.heldout import mean_loss
from mmft.engine.job import TrainJob
from mmft.engine.left_out import tell_left_out
from mmft.engine.memory import checkpoint_layers
from mmft.engine.optim import Masters, build_optimizer, lr_scale, set_learning_rate
from mmft.engine.ranks import Ranks
from mmft.engine.sharding import is_sharded
from mmft.engine.state import TrainState
from mmft.errors import CheckpointError, MemoryLimitError
from mmft.journal import Journal
from mmft.objectives.base import StepContext, StepObjective
from mmft.seeds import fold

__all__ = ["Engine", "TrainJob"]
_MOST_HALVINGS = 5
"""Times a run's micro-batches are made smaller before it gives up."""


class Engine:
    """One process's part of a run. Build it, then call `fit` once."""

    def __init__(
        self, job: TrainJob, *, accelerator: Accelerator, journal: Journal, callbacks: Sequence[Callback]
    ) -> None:
        self.job = job
        self.journal = journal
        self.accelerator = accelerator
        self.callbacks = callbacks
        self.masters = Masters(job.adapted.trainable())
        self.params = self.masters.weights
        self.updates = int(getattr(job.objective, "updates", 1))
        self._told = str(getattr(job.objective, "told_by_source", "loss"))
        updates = job.total_steps * self.updates
        self.optimizer = build_optimizer(job.adapted, job.section, self.params, total_steps=updates)
        self.state = TrainState()
        # Rows that make their batches themselves need no padding token, and their model may have none.
        self.pad = 0 if hasattr(job.renderer, "assemble") else job.adapted.backbone.pad_token_id
        count = None if job.section.gradient_checkpointing else job.recomputed
        self.recomputed = checkpoint_layers(job.adapted, count)
        self._training_mode()
        # accelerate gives processes and devices; precision, clipping and the sum over ranks are stated here.
        self.ranks = Ranks(accelerator, lockstep=is_sharded(job.adapted.model))
        self.ranks.start_alike(self.params.values())
        self.masters.give_weights()

    def _training_mode(self) -> None:
        set_modes(self.job.adapted)
        for layer in self.recomputed:
            layer.training = True

    def _autocast(self) -> AbstractContextManager[Any]:
        if not self.job.section.bf16:
            return nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)

    # -- the way through a run ------------------------------------------------------------------------------------

    def fit(self, *, resume: bool, signals: StopSignals | None = None) -> TrainState:
        """Train to the last step, or stop early; returns the final state (`stopped` says why, None if at the end).
        `signals`: open ones of a caller who has more to do before a second signal may end the process otherwise.

        Raises NonFiniteError, CheckpointError, DataError; a signal sets `stopped` to its number after a checkpoint.
        """
        if resume:
            self._restore()
        job, state = self.job, self.state
        if self.accelerator.is_main_process:
            require_room(job.checkpoints, self.params)
        for callback in self.callbacks:
            callback.on_start(state, job.total_steps)
        try:
            with nullcontext(signals) if signals is not None else StopSignals() as stops:
                while not self._train(stops):
                    pass
            if not (state.stopped or "").startswith("signal"):
                self._finish()
        finally:
            for callback in self.callbacks:
                callback.on_end(state)
        return state

    def _train(self, signals: StopSignals) -> bool:
        """All steps that are left, or up to a stop; False when the memory ran out and the micro-batches are smaller
        from here on: a step is repeated with the same rows, weights and divisor, as a run of that size computes it."""
        state = self.state
        for micros in self._steps():
            try:
                self._one_step(micros)
            except MemoryLimitError as error:
                if not self._make_smaller(error):
                    raise
                return False
            self._after_step()
            if self._any_signal(signals):
                self.save()
                state.stopped = f"signal {signals.received or 0}"
                signals.heeded = True
            if state.stopped:
                break
        return True

    def _make_smaller(self, error: MemoryLimitError) -> bool:
        """Whether the micro-batches could be halved. Not where ranks gather weights in every forward, nor once a step
        has made one of several updates."""
        plan, state = self._plan(), self.state
        if self.ranks.lockstep or self._updates_made or state.halvings >= _MOST_HALVINGS or plan.micro_batch == 1:
            return False
        state.halvings += 1
        self._no_gradients()
        smaller = self._plan()
        told = "; ".join(f"{problem.what} ({problem.where})" for problem in error.problems)
        self.journal.warn(
            f"{told}: on with micro-batches of {smaller.micro_batch} instead of "
            f"{plan.micro_batch}, {plan.rows_per_step} rows per step as before"
        )
        return True

    def _no_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.job.adapted.model.zero_grad(set_to_none=True)

    def _plan(self) -> StepPlan:
        plan = self.job.plan
        for _ in range(self.state.halvings):
            plan = plan.halved()
        return plan

    def _steps(self) -> Iterator[list[Batch]]:
        if self.state.stopped:  # a run that had stopped early is resumed: there is nothing left to train
            return iter(())
        return batches(
            self.job.samples,
            self.job.renderer,
            self._plan(),
            start_step=self.state.step,
            stop_step=self.job.total_steps,
            rank=self.accelerator.process_index,
            workers=self.job.section.dataloader_num_workers,
            pad_token_id=self.pad,
        )

    def _restore(self) -> None:
        folder = newest_valid(self.job.checkpoints, warn=self.journal.warn)
        if folder is None:
            self.journal.rewind(0)
            return
        restored = load_checkpoint(folder, trainable=self.params, optimizer=self.optimizer)
        _same_identity(restored.identity, self.job.identity, folder)
        self.masters.give_weights()
        self.state = restored.state
        self.journal.rewind(self.state.step)
        self.journal.say(f"resumed at step {self.state.step} from {folder.name}")

    # -- one optimizer step ---------------------------------------------------------------------------------------

    def _one_step(self, micros: Sequence[Batch]) -> None:
        job, section, state = self.job, self.job.section, self.state
        begin = time.monotonic()
        scale = lr_scale(
            state.step, total=job.total_steps, warmup_ratio=section.warmup_ratio, kind=section.lr_scheduler_type
        )
        set_learning_rate(self.optimizer, scale)
        count = self.ranks.sum([sum(job.objective.count(batch) for batch in micros)])[0]
        for update in range(self.updates):
            self._updates_made = update
            loss, norm, logs = self._update(micros, count, update)
        rows = sum(len(batch.ids) for batch in micros)
        rows_all, tokens_all = self.ranks.sum([rows, sum(batch.tokens for batch in micros)])
        state.step += 1
        state.samples_consumed += int(rows_all)
        state.tokens_consumed += int(tokens_all)
        if isinstance(job.samples, Streamed):
            tell_left_out(job, job.samples, state, micros, journal=self.journal)
        metrics = {
            "loss": loss,
            **{name: logs[part] / (logs[over] or 1.0) for name, (part, over) in job.objective.metrics.items()},
            "learning_rate": section.learning_rate * scale,
            "grad_norm": norm,
            "samples_per_second": rows_all / max(time.monotonic() - begin, 1e-9),
            "supervised_tokens": count,
            **self._by_source(logs),
            **({"skipped_steps": state.skipped} if state.skipped else {}),
        }
        for callback in self.callbacks:
            callback.on_step(state, metrics)

    def _update(self, micros: Sequence[Batch], count: float, update: int) -> tuple[float, float, dict[str, float]]:
        """Gradients and one update of the weights: the loss, the gradients' norm, the sums that are shown."""
        job, section, step = self.job, self.job.section, self.state.step + 1
        ids = [name for batch in micros for name in batch.ids]
        with self.ranks.together(f"step {step}", ids):
            sums = self._backward(micros, count, update)
            self.masters.take_gradients()
        self.ranks.sum_gradients(self.params)
        norm = float(torch.nn.utils.clip_grad_norm_(self.params.values(), section.max_grad_norm or float("inf")))
        logged = sorted({name for pair in job.objective.metrics.values() for name in pair} - {"count"})
        logged += [f"{what} of {source}" for source in job.sources for what in (self._told, "terms")]
        loss_sum, *found = self.ranks.sum([sums["loss"], *(sums.get(name, 0.0) for name in logged)])
        loss = loss_sum / max(count, 1)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip(loss, norm, ids)
            return loss, norm, {**dict(zip(logged, found, strict=True)), "count": count}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if isinstance(job.objective, StepObjective):
            job.objective.settle(self.params)
        self.masters.give_weights()
        return loss, norm, {**dict(zip(logged, found, strict=True)), "count": count}

    def _by_source(self, logs: dict[str, float]) -> dict[str, float]:
        """Mean loss (online: reward) and terms (supervised tokens, pairs) of each data set that is in the step."""
        found: dict[str, float] = {}
        for source in self.job.sources:
            if terms := logs[f"terms of {source}"]:
                found |= {f"{self._told}/{source}": logs[f"{self._told} of {source}"] / terms, f"terms/{source}": terms}
        return found

    def _skip(self, loss: float, norm: float, ids: Sequence[str]) -> None:
        """Count a step without an update; NonFiniteError when the recipe allows no more of them."""
        self.state.skipped += 1
        step = self.state.step + 1
        error = not_finite(
            f"loss {loss} and gradient norm {norm} at step {step}; the weights are those of the step before",
            everywhere(self._suspects) or everywhere(ids),
            folder=str(self.job.folder),
        )
        if self.state.skipped > self.job.section.skip_nonfinite_steps:
            raise error
        self._no_gradients()
        self.journal.warn(f"skipped: {error.problems[0].what} ({error.problems[0].where})")

    def _backward(self, micros: Sequence[Batch], count: float, update: int) -> dict[str, float]:
        """Gradients of this rank's rows, and its sums."""
        sums: dict[str, float] = {}
        self._suspects: list[str] = []
        ranks, objective, number = self.ranks, self.job.objective, self.state.step
        seeds = [
            fold(self.job.section.seed, "dropout", number, local * ranks.world + ranks.rank)
            for local in range(len(micros))
        ]
        if isinstance(objective, StepObjective):
            step = StepContext(
                count,
                tuple(seeds),
                self._placed,
                self._autocast,
                ranks.rank,
                ranks.world,
                number=number,
                update=update,
                together=partial(
                    ranks.together, f"step {number + 1}", [name for batch in micros for name in batch.ids]
                ),
            )
            return objective.backward(self.job.adapted.model, micros, step)
        for seed, batch in zip(seeds, micros, strict=True):
            torch.manual_seed(seed)
            with self._autocast():
                loss = objective.loss(self.job.adapted.model, self._placed(batch))
            if loss.sum.requires_grad:  # not where the rows pass nothing trained: text alone, and a projector
                (loss.sum * (1 / max(count, 1))).backward()
            found = float(loss.sum.detach())
            sums["loss"] = sums.get("loss", 0.0) + found
            if not math.isfinite(found):
                self._suspects += batch.ids
            for key, value in loss.logs.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        return sums

    def _placed(self, batch: Batch) -> Batch:
        """The batch on the device, its pictures in the type of the base's weights."""
        dtype = self.job.adapted.backbone.model.dtype
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.inputs.items()}
        return self.job.prepare(replace(batch, inputs=inputs).to(self.accelerator.device))

    # -- between steps --------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        section, state = self.job.section, self.state
        last = state.step == self.job.total_steps
        if self.job.eval_samples and (last or (section.eval_steps and state.step % section.eval_steps == 0)):
            self._evaluate()
        if state.stopped or (section.save_steps and state.step % section.save_steps == 0):
            self.save()

    def _evaluate(self) -> None:
        section, state = self.job.section, self.state
        loss, further = self._evaluated(self.job.eval_samples)
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
            if section.load_best_model_at_end:
                self.save()
        else:
            state.evaluations_without_gain += 1
            patience = section.early_stopping_patience
            if patience and state.evaluations_without_gain >= patience:
                state.stopped = f"no better loss in {patience} evaluations"
        metrics = {"eval_loss": loss, **further}  # one for all: a callback may add to it for those behind
        for callback in self.callbacks:
            callback.on_evaluate(state, metrics)

    def evaluate_loss(self, samples: Sequence[Sample]) -> float:
        """Mean loss over all supervised positions of `samples`, without gradients; the same on every rank."""
        return self._evaluated(samples)[0]

    def _evaluated(self, samples: Sequence[Sample]) -> tuple[float, dict[str, float]]:
        """The mean loss, and as `eval_NAME` the objective's further metrics. Raises NonFiniteError naming rows."""
        self.job.adapted.model.eval()
        with torch.no_grad(), self._autocast():
            loss, further, bad = mean_loss(self.job, samples, pad=self.pad, place=self._placed, ranks=self.ranks)
        self._training_mode()
        if not math.isfinite(loss):
            raise not_finite(
                f"eval loss {loss} at step {self.state.step}", everywhere(bad), folder=str(self.job.folder)
            )
        return loss, further

    def save(self) -> None:
        """Checkpoint of the current step, written by rank 0 while the others wait."""
        if self.accelerator.is_main_process:
            folder = save_checkpoint(
                self.job.checkpoints,
                trainable=self.params,
                optimizer=self.optimizer,
                state=self.state,
                identity=self.job.identity,
                keep=self.job.section.save_total_limit,
            )
            for callback in self.callbacks:
                callback.on_save(self.state, folder)
        self.accelerator.wait_for_everyone()

    def _any_signal(self, signals: StopSignals) -> bool:
        received = self.ranks.sum([float(signals.received or 0)])[0]
        if received and signals.received is None:
            signals.received = 15  # another rank was told to stop; this one follows it
        return bool(received)

    def _finish(self) -> None:
        if self.state.step:
            self.save()
        best = self.state.best_step
        if self.job.section.load_best_model_at_end and best is not None and best != self.state.step:
            load_checkpoint(checkpoint_folder(self.job.checkpoints, best), trainable=self.params, optimizer=None)
            self.masters.give_weights()


def _same_identity(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    differing = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
    if differing:
        rows = "; ".join(f"{key}: {stored.get(key)} → {wanted.get(key)}" for key in differing[:6])
        raise CheckpointError(
            f"the run has changed since this checkpoint ({rows})",
            where=str(folder),
            allowed="the same base, data, processor and recipe",
            do="undo the change, or start a new run under another `name`",
        )
