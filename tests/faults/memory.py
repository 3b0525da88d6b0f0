"""F16: memory that runs out, in one process and on one of several, in every kind of step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.numbers import every_loss
from tests.faults.ranks import two
from tests.faults.trial import Fault, Tally, answer, expect, finish, ledger, newest, recipe, run_of, train, wait

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB"
TIMEOUT = 30
"""`train.ddp_timeout`: a process that waits for one which went on alone ends by it."""


def memory_above(rows: int, *, first: int = 1, training: bool = True) -> Callable[[], None]:
    """A `prepare`: from forward `first` on there is memory for at most `rows` rows."""

    def change(made: Any, batch: Any, forward: int, is_training: bool) -> Any:
        if is_training == training and len(batch.ids) > rows and forward >= first:
            raise RuntimeError(TEXT)
        return made()

    return every_loss(change)


def memory_above_in_backward(rows: int) -> Callable[[], None]:
    """A `prepare`: the backward pass has memory for at most `rows` rows."""

    def refuse(_: Any) -> None:
        raise RuntimeError(TEXT)

    def change(made: Any, batch: Any, forward: int, training: bool) -> Any:
        found = made()
        if training and len(batch.ids) > rows:
            found.sum.register_hook(refuse)
        return found

    return every_loss(change)


def no_place_above(rows: int, *, first: int = 1) -> Callable[[], None]:
    """A `prepare`: from batch `first` on the device has room for at most `rows` rows, whatever the objective does."""

    def prepare() -> None:
        from mmft.engine.loop import Engine

        inner, seen = Engine._placed, [0]

        def placed(self: Any, batch: Any) -> Any:
            seen[0] += 1
            if len(batch.ids) > rows and seen[0] >= first:
                raise RuntimeError(TEXT)
            return inner(self, batch)

        Engine._placed = placed  # type: ignore[method-assign]

    return prepare


def on_rank(rank: int, prepare: Callable[[], None]) -> Callable[[], None]:
    """A `prepare` for that process only."""

    def chosen() -> None:
        if os.environ["RANK"] == str(rank):
            prepare()

    return chosen


def out_of_memory(tally: Tally, count: int) -> None:
    """F16: at the first forward, within a step, late in the run, in an evaluation, and beyond remedy; then on one of
    two processes, and for objectives that make a step themselves."""
    plain = {"adapter.lora_dropout": 0.1, "train.effective_batch_size": 8, "train.max_steps": 12}
    large = recipe(tally, plain | {"train.per_device_train_batch_size": 4})
    smaller = {
        size: completed_as(tally, recipe(tally, plain | {"train.per_device_train_batch_size": size}))
        for size in ((1, 2) if count > 7 else (2,))
    }
    starts = [(2, 1, "the first forward"), (2, 2, "the second forward of a step"), (1, 1, "the first, twice")]
    for size, first, what in starts[: 3 if count > 7 else 1]:
        with tally.trial(what):
            place = tally.place("run")
            code = finish(train(large, place, prepare=memory_above(size, first=first)), place / "log")
            expect(code == 0, f"exit {code}: {(place / 'log').read_text()[-600:]}")
            _like(tally, run_of(place), smaller[size])
            _ledger_is_whole(run_of(place), smaller[size])
    with tally.trial("late in the run"):
        place = tally.place("run")
        code = finish(train(large, place, prepare=memory_above(2, first=17)), place / "log")
        expect(code == 0, f"exit {code}: {(place / 'log').read_text()[-600:]}")
        _ledger_is_whole(run_of(place), smaller[2])
    if count > 7:
        with tally.trial("in an evaluation"):
            _in_evaluation(tally, plain)
    with tally.trial("beyond remedy"):
        place = tally.place("run")
        code = finish(train(large, place, prepare=memory_above(0, first=9)), place / "log")
        text = (place / "log").read_text()
        expect(code == 6 and "row-" in text and "per_device_train_batch_size" in text, f"exit {code}: {text[-500:]}")
        expect(newest(run_of(place)) == 4, f"the newest checkpoint is of step {newest(run_of(place))}")
    for kind, way, prepare, rank in _of_several(count):
        with tally.trial(f"{kind}, {way}"):
            _one_of_several(tally, kind, prepare, rank)


def _of_several(count: int) -> list[tuple[str, str, Callable[[], None], int | None]]:
    """(kind of run, what happens, how, on which of two processes; None for one process alone)."""
    found: list[tuple[str, str, Callable[[], None], int | None]] = [
        ("sft", "backward pass of rank 1", memory_above_in_backward(2), 1),
        ("contrastive", "rank 0", no_place_above(2), 0),
        ("grpo", "rank 1", no_place_above(4), 1),
        ("sft", "forward of rank 1, within a step", memory_above(2, first=4), 1),
        ("contrastive", "second pass of rank 1", no_place_above(2, first=2), 1),
        ("contrastive", "one process", no_place_above(2, first=3), None),
        ("grpo", "one process", no_place_above(4), None),
        ("ppo", "rank 0", no_place_above(4), 0),
    ]
    return found if count > 7 else found[:3]


KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "contrastive": {"objective": {"name": "contrastive"}},
    "grpo": {"objective": {"name": "grpo", "rewards": {"length": 1.0}, "num_generations": 2}},
    "ppo": {"objective": {"name": "ppo", "rewards": {"length": 1.0}, "num_generations": 2}},
}


def _several(tally: Tally, kind: str) -> dict[str, Any]:
    """Two forwards of 4 rows a step and rank. AdamW's epsilon is large: with its usual one a gradient of rounding noise
    moves its weight by the full rate, and no two sizes of forwards could be compared."""
    values = recipe(
        tally, {"adapter.lora_dropout": 0.0, "train.per_device_train_batch_size": 4, "data.max_length": 128}
    )
    values |= KINDS[kind]
    if kind == "contrastive":
        place = tally.folder / "dual"

        def make() -> dict[str, Any]:
            import tempfile

            tempfile.tempdir = str(place)
            from tests.objectives.pairs import values as pairs

            return pairs(place)

        if not place.exists():
            place.mkdir()
            (place / "values.json").write_text(json.dumps(answer(make, tally.folder)))
        pairs = json.loads((place / "values.json").read_text())
        values |= {name: pairs[name] for name in ("model", "data", "adapter")}
        values["data"].pop("eval")
        values["adapter"]["lora_dropout"] = 0.0
    values["train"] |= {"effective_batch_size": 16, "max_steps": 6, "adam_epsilon": 1e-2, "ddp_timeout": TIMEOUT}
    return values


def _one_of_several(tally: Tally, kind: str, prepare: Callable[[], None], rank: int | None) -> None:
    """The run in which it happens ends as the run of the smaller size, and as the one with memory enough."""
    values = _several(tally, kind)
    ends = []
    for name, size, how in (("short", 4, prepare), ("small", 2, None), ("enough", 4, None)):
        place = tally.place(name)
        values["train"]["per_device_train_batch_size"] = size
        if rank is None:
            codes = [finish(train(values, place, prepare=how), place / "log0")]
        else:
            chosen = None if how is None else on_rank(rank, how)
            codes = [wait(pid) for pid in two(values, place, prepare=chosen)]
        expect(not any(codes), f"{name}: exits {codes}: {(place / 'log0').read_text()[-900:]}")
        ends.append(run_of(place) / "checkpoints" / "step-000006")
    events = [json.loads(line) for line in (run_of(tally.folder / "short") / "events.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if event["kind"] == "warning" and "out of memory" in event["text"]]
    expect(len(told) == 1 and "micro-batches of 2 instead of 4, 16 rows" in told[0], f"told: {told}")
    expect(told[0].count("row-") + told[0].count("pair-") >= 4, f"the samples are not named: {told}")
    apart = difference(ends[0], ends[1])
    tally.measure(apart)
    expect(apart <= 1e-6, f"weights differ by {apart:.2e} from the run of the smaller size")
    # The sums of other forwards round in another order: weights keep that, losses show it (those of RL are near 0).
    for one, other in zip(*(ledger(end.parents[1]) for end in ends[::2]), strict=True):
        expect(
            abs(one[1] - other[1]) <= 1e-6 * max(1.0, abs(other[1])), f"losses {one} and, with memory enough, {other}"
        )
    counts = [json.loads((end / "state.json").read_text())["state"]["samples_consumed"] for end in ends]
    expect(counts == [96, 96, 96], f"{counts} samples")


def _like(tally: Tally, run: Path, other: Path) -> None:
    apart = difference(digest_folder(run), other)
    tally.measure(apart)
    expect(apart <= 1e-6, f"weights differ by {apart:.2e}")


def _in_evaluation(tally: Tally, plain: dict[str, Any]) -> None:
    held = {"data.eval": [{"path": recipe(tally)["data"]["train"][0]["path"], "name": "held"}], "train.eval_steps": 6}
    held |= {"evaluate.models": ["adapter"], "evaluate.max_new_tokens": 2, "evaluate.bootstrap_samples": 10}
    losses = []
    for prepare in (None, memory_above(5, training=False)):
        place = tally.place("run")
        code = finish(train(recipe(tally, plain | held), place, prepare=prepare), place / "log")
        expect(code == 0, f"exit {code}: {(place / 'log').read_text()[-600:]}")
        lines = [json.loads(line) for line in (run_of(place) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["eval_loss"] for line in lines if "eval_loss" in line])
    expect(len(losses[0]) == 2, f"{len(losses[0])} evaluations")
    for one, other in zip(*losses, strict=True):
        expect(abs(one - other) <= 1e-6 * abs(one), f"held-out loss {other} instead of {one}")


def completed_as(tally: Tally, values: dict[str, Any]) -> Path:
    """The run folder of an uninterrupted run of `values`, kept."""
    place = tally.place(f"small-{values['train']['per_device_train_batch_size']}")
    code = finish(train(values, place), place / "log")
    if code:
        raise RuntimeError((place / "log").read_text()[-1500:])
    return digest_folder(run_of(place))


def digest_folder(run: Path) -> Path:
    """The last checkpoint of a run of 12 steps."""
    return run / "checkpoints" / "step-000012"


def difference(one: Path, other: Path) -> float:
    """Largest difference of the weights of two checkpoints, relative to the largest weight of the tensor."""
    import numpy as np
    from safetensors.numpy import load_file

    first, second = load_file(one / "trainable.safetensors"), load_file(other / "trainable.safetensors")
    expect(first.keys() == second.keys(), "other tensors")
    return max(
        float(np.abs(first[name] - second[name]).max() / max(np.abs(second[name]).max(), 1e-30)) for name in first
    )


def _ledger_is_whole(run: Path, other: Path) -> None:
    """The same steps with the same number of rows and supervised tokens: nothing lost, nothing twice."""
    wanted = ledger(other.parents[1])
    found = ledger(run)
    expect(
        [(step, tokens) for step, _, tokens in found] == [(step, tokens) for step, _, tokens in wanted], "the ledger"
    )
    states = [json.loads((folder / "state.json").read_text())["state"] for folder in (digest_folder(run), other)]
    expect(states[0]["samples_consumed"] == states[1]["samples_consumed"] == 96, f"{states[0]} samples")


FAULTS = (Fault("F16", "out of memory: smaller micro-batches, the same steps", 14, 6, "of the weights", out_of_memory),)
MUTANTS = (
    ("F16", "mmft/data/order.py", "micro_per_step=self.micro_per_step * parts)", "micro_per_step=self.micro_per_step)"),
    ("F16", "mmft/engine/ranks.py", "            if self.world == 1 or self.lockstep:\n", "            if True:\n"),
)
