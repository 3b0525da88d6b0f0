"""F8: numbers that are not finite."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any

from tests.faults.ranks import two
from tests.faults.trial import (
    Fault,
    Tally,
    digest,
    expect,
    finish,
    ledger,
    newest,
    recipe,
    run_of,
    same,
    train,
    wait,
)


class _Changed:
    """An objective whose losses go through `change(made, batch, forward, is it training)`."""

    def __init__(self, inner: Any, change: Callable[[Any, Any, int, bool], Any]) -> None:
        self._inner, self._change, self._seen = inner, change, {True: 0, False: 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def loss(self, model: Any, batch: Any) -> Any:
        import torch

        training = torch.is_grad_enabled()
        self._seen[training] += 1
        return self._change(lambda: self._inner.loss(model, batch), batch, self._seen[training], training)


def every_loss(change: Callable[[Any, Any, int, bool], Any]) -> Callable[[], None]:
    """A `prepare` after which each loss of the engine goes through `change`."""

    def prepare() -> None:
        from dataclasses import replace

        from mmft.engine.loop import Engine

        inner = Engine.__init__

        def start(self: Any, job: Any, **more: Any) -> None:
            inner(self, replace(job, objective=_Changed(job.objective, change)), **more)

        Engine.__init__ = start  # type: ignore[assignment]

    return prepare


def nan_in_forwards(*forwards: int, training: bool = True) -> Callable[[], None]:
    """A `prepare`: the loss of these forwards (from 1) is NaN."""
    from dataclasses import replace

    def change(made: Any, batch: Any, forward: int, is_training: bool) -> Any:
        found = made()
        return (
            replace(found, sum=found.sum * float("nan")) if is_training == training and forward in forwards else found
        )

    return every_loss(change)


def nan_in_a_gradient(step: int) -> Callable[[], None]:
    """A `prepare`: one value of one gradient tensor is infinite in this step, the loss is finite."""

    def prepare() -> None:
        from mmft.engine.optim import Masters

        inner, seen = Masters.take_gradients, [0]

        def take(self: Any) -> None:
            inner(self)
            seen[0] += 1
            if seen[0] == step:
                sorted(self.weights.items())[0][1].grad.view(-1)[0] = float("inf")

        Masters.take_gradients = take  # type: ignore[method-assign]

    return prepare


def not_finite(tally: Tally, count: int) -> None:
    """F8: NaN in a loss, in one of four micro-batches, in a gradient, in an evaluation, in an adapter file; allowed
    three times."""
    four = {"train.effective_batch_size": 8, "train.max_steps": 12}
    held = {"data.eval": [{"path": recipe(tally)["data"]["train"][0]["path"], "name": "held"}], "train.eval_steps": 5}
    held |= {"evaluate.models": ["adapter"], "evaluate.max_new_tokens": 2, "evaluate.bootstrap_samples": 10}
    cases: list[tuple[str, dict[str, Any], Callable[[], None], int, int]] = [
        ("the loss", {}, nan_in_forwards(11), 11, 2),
        ("one of four micro-batches", four, nan_in_forwards(4 * 5 + 3), 6, 2),
        ("one gradient", {}, nan_in_a_gradient(7), 7, 2),
        ("the held-out loss", held, nan_in_forwards(3, training=False), 15, 16),
    ]
    for what, changes, poison, step, rows in cases[: max(1, count - 3)]:
        with tally.trial(f"NaN in {what}"):
            _one_not_finite(tally, recipe(tally, changes), poison, step=step, rows=rows, held=bool(changes is held))
    if count > 4:
        with tally.trial("NaN on one of two processes"):
            _on_one_rank(tally)
    with tally.trial("the fourth of three that are allowed"):
        _allowed(tally)
    with tally.trial("NaN in an adapter file"):
        _bad_adapter(tally)


def _one_not_finite(
    tally: Tally, values: dict[str, Any], poison: Callable[[], None], *, step: int, rows: int, held: bool
) -> None:
    last = values["train"]["max_steps"]
    whole, place = tally.place("whole"), tally.place("run")
    expect(finish(train(values, whole), whole / "log") == 0, (whole / "log").read_text()[-500:])
    code = finish(train(values, place, prepare=poison), place / "log")
    text = (place / "log").read_text()
    expect(code == 5 and f"at step {step}" in text, f"exit {code}: {text[-600:]}")
    named = text.split("samples ", 1)[1].splitlines()[0]
    expect(named.count("row-") >= min(rows, 2), f"the samples are not named: {named}")
    expect(newest(run_of(place)) == (step - 1) // 4 * 4, f"the newest checkpoint is of step {newest(run_of(place))}")
    expect(max(at for at, _, _ in ledger(run_of(place))) == step - (0 if held else 1), "the step was counted")
    expect(finish(train(values, place, resume=True), place / "log") == 0, (place / "log").read_text()[-700:])
    same(digest(run_of(place), step=last), digest(run_of(whole), step=last))


def _on_one_rank(tally: Tally) -> None:
    """Both processes stop with exit 5 and both name the rows of the one that met the NaN."""
    values, place = recipe(tally, {"train.effective_batch_size": 4}), tally.place("run")
    poison = nan_in_forwards(7)

    def on_the_second() -> None:
        if os.environ["RANK"] == "1":
            poison()

    codes = [wait(pid) for pid in two(values, place, prepare=on_the_second)]
    texts = [(place / f"log{rank}").read_text() for rank in (0, 1)]
    expect(codes == [5, 5], f"exits {codes}: {texts[0][-500:]}")
    named = [text.split("samples ", 1)[1].splitlines()[0] for text in texts]
    expect(named[0] == named[1] and named[0].count("row-") == 2, f"named: {named}")
    expect(newest(run_of(place)) == 4, f"the newest checkpoint is of step {newest(run_of(place))}")


def _allowed(tally: Tally) -> None:
    values, place = recipe(tally, {"train.skip_nonfinite_steps": 3}), tally.place("run")
    code = finish(train(values, place, prepare=nan_in_forwards(3, 6, 9, 14)), place / "log")
    text = (place / "log").read_text()
    expect(code == 5 and "at step 14" in text, f"exit {code}: {text[-500:]}")
    events = [json.loads(line) for line in (run_of(place) / "events.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if event["kind"] == "warning" and event["text"].startswith("skipped")]
    expect(len(told) == 3 and all("samples row-" in text for text in told), f"{len(told)} skipped steps in the log")
    losses = [json.loads(line)["loss"] for line in (run_of(place) / "metrics.jsonl").read_text().splitlines()]
    expect([at for at, loss in enumerate(losses, 1) if loss == "nan"] == [3, 6, 9], f"the log hides one: {losses}")


def _bad_adapter(tally: Tally) -> None:
    from safetensors.numpy import load_file, save_file

    values, place = recipe(tally, {"train.max_steps": 2}), tally.place("run")
    expect(finish(train(values, place), place / "log") == 0, (place / "log").read_text()[-500:])
    bad = tally.folder / "bad-adapter"
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(run_of(place) / "adapter", bad)
    tensors = load_file(bad / "adapter_model.safetensors")
    name = tally.draw.choice(sorted(tensors))
    tensors[name].flat[tally.draw.randrange(tensors[name].size)] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    place = tally.place("run")
    values = recipe(tally, {"train.max_steps": 2, "adapter.init_from": str(bad)})
    code = finish(train(values, place), place / "log")
    text = (place / "log").read_text()
    expect(code == 8 and "NaN or infinity" in text and name.split(".lora")[0] in text, f"exit {code}: {text[-500:]}")
    expect(not (run_of(place) / "metrics.jsonl").exists(), "steps were taken with it")


FAULTS = (Fault("F8", "NaN and infinity in losses, gradients, evaluations, adapters", 7, 4, "", not_finite),)
MUTANTS = (
    (
        "F8",
        "mmft/engine/loop.py",
        "if not (math.isfinite(loss) and math.isfinite(norm)):",
        "if not (math.isfinite(loss) and math.isfinite(norm)) and section.skip_nonfinite_steps:",
    ),
)
