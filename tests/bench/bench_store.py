"""`python -m tests.bench.bench_store`: what filling the feature store costs the first epoch.

Each round trains one epoch of unique pictures twice, in fresh processes, with the whole fast path: without the store,
and with an empty one. Printed: samples/s of both and their ratio by the wall clock; and, by processor time, which
others' work on the machine disturbs less, what a row costs in both, and in the epoch that fills each thing that the
store does: reading and hashing a picture's bytes (`address`), looking it up (`get`), writing its features (`put`). The
share is of the step on as many threads as there are (these things run on one). The encoder sees a row alone with the
store and a batch without: its time a row in both is on lines of its own. The clock starts after step 3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENCODER = "encoder"


def timed(owner: Any, name: str, spent: dict[str, float], label: str = "") -> None:
    """Add the seconds of every call of `owner.name` to `spent`."""
    inner: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **named: Any) -> Any:
        clock = time.process_time if label else time.thread_time
        begin = clock()
        try:
            return inner(*args, **named)
        finally:
            key = label or name
            spent[key] = spent.get(key, 0.0) + clock() - begin

    setattr(owner, name, call)


def run(told: dict[str, Any]) -> dict[str, Any]:
    """One arm in this process: `bench`'s figures, and seconds a row of what the store does."""
    import torch
    from transformers.models.llava.modeling_llava import LlavaModel
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMModel

    from mmft.fast import stored
    from mmft.fast.slabs import Slabs
    from mmft.quiet import quiet_upstream
    from tests.bench import arms, watch

    spent: dict[str, float] = {}
    used: list[float] = []
    for owner, name, label in (
        (stored, "address", ""),
        (Slabs, "get", ""),
        (Slabs, "put", ""),
        (LlavaModel, "get_image_features", ENCODER),
        (SmolVLMModel, "get_image_features", ENCODER),
    ):
        timed(owner, name, spent, label)

    class Watch(watch.Watch):
        def on_step(self, state: Any, metrics: dict[str, float]) -> None:
            super().on_step(state, metrics)
            used.append(time.process_time())
            if len(self.ends) == watch.WARM:
                spent.clear()

    arms.Watch = Watch  # type: ignore[misc]
    quiet_upstream()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    with tempfile.TemporaryDirectory(prefix="mmft-bench-") as name:
        found = arms.run_mmft(told, Path(name))
    rows, threads = told["batch"] * (told["steps"] - watch.WARM), torch.get_num_threads()
    spent["step"] = used[-1] - used[watch.WARM - 1]
    return {**found, "threads": threads, "spent": {name: value / rows for name, value in sorted(spent.items())}}


def rounds(given: argparse.Namespace, workload: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Figures of both arms in every round."""
    from mmft.fast.known import CANDIDATES
    from tests.bench.models import save_model, save_rows

    count = given.rows - given.rows % given.batch
    rows = save_rows(folder / f"{workload}-{given.data}-{count}", workload, given.data, count)
    model = save_model(folder / workload, workload)
    told = {"model": str(model), "rows": str(rows), "batch": given.batch, "steps": count // given.batch}
    others = [one.name for one in CANDIDATES if one.name != "feature_store"]
    found: dict[str, list[dict[str, Any]]] = {"without": [], "filling": []}
    cache = folder / "store-cache"  # the kernels' times stay: both arms must compute alike
    for turn in range(given.rounds):
        for arm in found if turn % 2 == 0 else reversed(found):
            shutil.rmtree(cache / "features", ignore_errors=True)
            words = json.dumps({**told, "arm": "mmft", "fast": others if arm == "without" else True})
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.bench_store", "--arm", words],
                cwd=ROOT,
                env={**os.environ, "MMFT_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
            sys.stderr.write(f"round {turn + 1} {arm}: {found[arm][-1]['samples_per_second']:.2f} samples/s\n")
    return found


def told_of(workload: str, found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The lines that are printed for a workload."""
    speed = {arm: [one["samples_per_second"] for one in ours] for arm, ours in found.items()}
    ratios = sorted(a / b for a, b in zip(speed["filling"], speed["without"], strict=True))
    middle = {
        arm: {name: statistics.median(one["spent"].get(name, 0.0) for one in ours) for name in ours[0]["spent"]}
        for arm, ours in found.items()
    }
    encoder, step = ({arm: values.pop(name) for arm, values in middle.items()} for name in (ENCODER, "step"))
    threads = found["filling"][0]["threads"]
    lines = [
        f"{workload:<10}without {statistics.median(speed['without']):6.2f} samples/s, "
        f"filling {statistics.median(speed['filling']):6.2f}, "
        f"ratio {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    ]
    parts = {**middle["filling"], "in all": sum(middle["filling"].values())}
    for name, seconds in parts.items():
        share = seconds * threads / step["filling"]
        lines.append(
            f"{workload:<10}{name:<10}{1000 * seconds:9.3f} ms a row {share:8.2%} of a step on {threads} threads"
        )
    for what, of in (("step", step), (ENCODER, encoder)):
        told = ", ".join(f"{1000 * of[arm]:.1f} {arm}" for arm in found)
        lines.append(f"{workload:<10}{what:<10}ms of processor time a row: {told}")
    return lines


def main() -> None:
    """The lines of every workload; with `--arm` one arm, in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", default=["llava", "smolvlm"])
    parser.add_argument("--data", default="vqa")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", help="a folder for models and rows, kept for the next time")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        sys.stdout.write("\n" + json.dumps(run(json.loads(given.arm))) + "\n")
        return
    with tempfile.TemporaryDirectory(prefix="mmft-store-") as name:
        for workload in given.workload:
            found = rounds(given, workload, Path(given.keep or name))
            sys.stdout.write("\n".join(told_of(workload, found)) + "\n")


if __name__ == "__main__":
    main()
