"""`make bench`: mmft against transformers' Trainer with peft on the same rows, alternating, each arm a fresh process.

Workload: a LLaVA of 6 layers, hidden 384, vocabulary 32,768, CLIP tower of 6 layers, random weights from config, one
picture, one question and one short answer a row; LoRA r=16 on the language model's linears, bf16 autocast, batch 4.
Prints samples/s (median step), peak memory, the ratio in each round, and both arms' first loss, which must agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmft.data.collate import Batch
from mmft.objectives.sft import SftObjective

IMAGE, LENGTH, ANSWER, BATCH = 9, 150, 12, 4


def make_model() -> Any:
    """The workload's model with LoRA on the language model's linears; the same weights in every process."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32768, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6
    )
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=160,
        patch_size=16,
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    linears = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=linears))


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of a picture (100 tokens), a question and a supervised answer."""
    source = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        ids = torch.randint(10, 32768, (LENGTH,), generator=source)
        ids[1:101] = IMAGE
        labels = torch.full_like(ids, -100)
        labels[-ANSWER:] = ids[-ANSWER:]
        pixels = torch.randn(3, 160, 160, generator=source).bfloat16()
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return rows


def run_trainer(steps: int) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of transformers' Trainer, checkpointing off, nothing saved or reported."""
    import tempfile

    from transformers import Trainer, TrainerCallback, TrainingArguments

    seen: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        begin = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((time.perf_counter() - self.begin, 0.0))

    class Logged(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

    losses: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=True,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=2e-4,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        )
        Logged(make_model(), arguments, train_dataset=make_rows(steps * BATCH), callbacks=[Watch()]).train()
    return [(seconds, loss) for (seconds, _), loss in zip(seen, losses, strict=True)]


def run_mmft(steps: int) -> list[tuple[float, float]]:
    """(seconds, loss) of each step of mmft's objective with the engine's order of operations."""
    model = make_model()
    model.eval()
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0, fused=True)
    objective = SftObjective(head=model.get_base_model().get_output_embeddings())
    rows, seen = make_rows(steps * BATCH), []
    for step in range(steps):
        begin = time.perf_counter()
        chunk = rows[step * BATCH : (step + 1) * BATCH]
        inputs = {key: torch.stack([row[key] for row in chunk]) for key in ("input_ids", "pixel_values")}
        labels = torch.stack([row["labels"] for row in chunk])
        batch = Batch(inputs, labels, ("",) * BATCH, supervised=ANSWER * BATCH, tokens=labels.numel(), padding=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective.loss(model, batch)
        (loss.sum / loss.count).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen.append((time.perf_counter() - begin, float(loss.sum.detach()) / loss.count))
    return seen


def one_arm(name: str, steps: int) -> None:
    """Child process: run an arm and print its figures as JSON."""
    seen = (run_trainer if name == "trainer" else run_mmft)(steps)
    seconds = statistics.median(second for second, _ in seen[2:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"samples_per_second": BATCH / seconds, "loss": seen[0][1], "peak": peak}) + "\n")


def main() -> None:
    """Alternate the arms for some rounds and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.arm:
        one_arm(given.arm, given.steps)
        return
    found: dict[str, list[dict[str, float]]] = {"trainer": [], "mmft": []}
    for _ in range(given.rounds):
        for arm, figures in found.items():
            command = [sys.executable, str(Path(__file__)), "--arm", arm, "--steps", str(given.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            figures.append(json.loads(done.stdout.splitlines()[-1]))
    lines = [f"{'arm':<28}{'samples/s':>12}{'peak GB':>10}{'first loss':>12}"]
    for arm, figures in found.items():
        speed = statistics.median(figure["samples_per_second"] for figure in figures)
        peak = max(figure["peak"] for figure in figures) / 1e9
        label = "transformers Trainer + peft" if arm == "trainer" else "mmft"
        lines.append(f"{label:<28}{speed:>12.2f}{peak:>10.2f}{figures[0]['loss']:>12.4f}")
    ratios = sorted(
        ours["samples_per_second"] / theirs["samples_per_second"]
        for ours, theirs in zip(found["mmft"], found["trainer"], strict=True)
    )
    lines.append(f"ratio mmft / Trainer by round: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    difference = abs(found["mmft"][0]["loss"] - found["trainer"][0]["loss"])
    # bf16 logits of ln(32768) = 10.4 are spaced by 0.06; their mean over 48 rows agrees far better than that.
    lines.append(f"first losses differ by {difference:.4f} ({'valid' if difference < 2e-2 else 'NOT VALID'})")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
