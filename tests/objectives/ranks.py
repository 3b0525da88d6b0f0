"""`python -m tests.objectives.ranks OUT`: runs on two data sets of objectives that are quick to train, each by one
process and by two over gloo, forked from a warm parent."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.faults.ranks import two
from tests.faults.trial import answer, expect, finish, train, wait

NAMES = ("classification", "mlm")
TRAIN = {"max_steps": 3, "effective_batch_size": 8, "per_device_train_batch_size": 2, "num_train_epochs": 1}
TRAIN |= {"save_steps": 0, "eval_steps": 0, "logging_steps": 1, "learning_rate": 1e-3, "bf16": False}


def recipes(out: Path) -> dict[str, dict[str, Any]]:
    """Tiny models and rows in `out`, and what is trained of them."""
    tempfile.tempdir = str(out)  # for what the makers share within a process
    import transformers

    from tests.fusion.small import ENCODERS
    from tests.fusion.test_processor import tokenizer
    from tests.objectives import joints, pairs
    from tests.objectives.test_joint_runs import recipe

    bert = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**ENCODERS["bert"][1]))
    bert.save_pretrained(out / "bert")
    tokenizer().save_pretrained(out / "bert")
    sets = []
    for name, count in (("few", 5), ("many", 16)):
        lines = [f'{{"id": "{name}{at}", "note": "red dog runs", "y": "{"abc"[at % 3]}"}}' for at in range(count)]
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        sets.append({"path": str(out / f"{name}.jsonl"), "name": name, "columns": {"note": "text", "y": "label"}})
    classes: dict[str, Any] = {
        "model": {"encoders": {"text": str(out / "bert")}, "dtype": "float32"},
        "adapter": {"targets": ["language.attention"], "lora_rank": 4, "modules_to_save": ["projector", "head"]},
        "data": {"train": sets},
        "objective": {"name": "classification", "hidden_size": 16, "strategy": "gated", "focal_gamma": 1.0},
    }
    words = recipe(out, "mlm", joints.tiny_masked("vilt"), adapter__targets=["language"], data__eval=[])
    words["data"]["train"] = [{"path": str(pairs.pair_rows(8, at)), "name": f"set{at}"} for at in range(2)]
    return {
        name: {**values, "name": "tiny", "train": TRAIN, "export": {"merge": False}}
        for name, values in zip(NAMES, (classes, words), strict=True)
    }


def main() -> None:
    """Every run, into OUT/NAME/one and OUT/NAME/two."""
    from tests.faults.__main__ import warm

    out = Path(sys.argv[1])
    warm()
    for name, values in answer(lambda: recipes(out), out).items():
        one, both = out / name / "one", out / name / "two"
        one.mkdir(parents=True)
        both.mkdir()
        codes = [finish(train(values, one), one / "log0")]
        codes += [wait(pid) for pid in two(values, both)]
        expect(
            not any(codes), f"{name}: {codes} {(one / 'log0').read_text()[-1500:]}{(both / 'log0').read_text()[-1500:]}"
        )


if __name__ == "__main__":
    main()
