"""Larger random checkpoints, written without building the model, and a child that merges them under observation."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmft.export.names import meta_model
from mmft.export.shards import Output, plan_shards
from mmft.export.writer import write_shards
from tests.export import zoo

_CHILD = """
import resource, sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
import peft, transformers, bitsandbytes
from mmft.export.merge import merge_adapter
from mmft.export.names import map_names, meta_model
from mmft.export.shards import Weights, weight_files
from tests.export import zoo
base, adapter, out = map(Path, sys.argv[1:4])
meta_model(base)  # imports the model's modules
started = time.monotonic()
with Weights(weight_files(base)) as weights:  # transformers' table of renamings, as in a process that loads a model
    map_names(meta_model(base), weights.entries)
table = time.monotonic() - started
if int(sys.argv[4]):  # private writable memory, heap and anonymous maps: what malloc and torch's allocator take
    with open("/proc/self/status") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + int(sys.argv[4]), data + int(sys.argv[4])))
print("ready", flush=True)
sys.stdin.readline()
started = time.monotonic()
merge_adapter(base, adapter, out)
print(time.monotonic() - started, table, flush=True)  # with the manifest, and the folder in its place
"""


def big_pair(folder: Path, *, megabytes: int, hidden: int = 512, vocabulary: int = 8000) -> tuple[Path, Path]:
    """A bf16 llava folder of about `megabytes`, in 100 MB shards, and a rank 16 adapter on its language layers."""
    base, adapter = folder / "base", folder / "adapter"
    zoo.tiny("llava").save_pretrained(base)
    (base / "model.safetensors").unlink()
    config = json.loads((base / "config.json").read_text())
    layer = 2 * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * 4 * hidden)
    config["dtype"] = "bfloat16"
    config["text_config"] |= {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
        "head_dim": hidden // 4,
        "num_hidden_layers": max(1, (megabytes * 10**6 - 4 * vocabulary * hidden) // layer),
    }
    (base / "config.json").write_text(json.dumps(config))
    shapes = {name: tuple(value.shape) for name, value in meta_model(base).state_dict().items()}
    outputs = [Output(_disk(name), torch.bfloat16, shape) for name, shape in shapes.items()]
    shards = plan_shards(outputs, 100 * 10**6)
    write_shards(base, shards, lambda output: iter([_noise(output.nbytes)]))
    factors = {}
    for name, shape in shapes.items():
        if "language_model.layers" in name and "proj" in name:
            stem = "base_model.model." + name.removesuffix(".weight")
            factors[f"{stem}.lora_A.weight"] = torch.randn(16, shape[1]) * 0.01
            factors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 16) * 0.01
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    return base, adapter


def part_of(adapter: Path, folder: Path, part: str) -> Path:
    """The same adapter with those tensors alone whose name holds `part`."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    kept = {name: value for name, value in load_file(adapter / "adapter_model.safetensors").items() if part in name}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def _disk(name: str) -> str:
    for new, old in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name.removeprefix("model.")


def _noise(nbytes: int) -> memoryview:
    values = torch.randn(min(nbytes // 2, 1 << 20)) * 0.02
    whole = values.to(torch.bfloat16).repeat(nbytes // 2 // values.numel() + 1)[: nbytes // 2]
    return memoryview(whole.contiguous().view(torch.uint8).numpy())


def watched_merge(base: Path, adapter: Path, out: Path, *, limit: int = 0) -> tuple[int, int, float, float]:
    """Merge in a child of its own: anonymous memory in bytes before, its peak during the merge, and the seconds.

    The last number are the seconds that transformers takes once per process for its table of renamings.
    `limit` is an RLIMIT_DATA above what the process has after its imports: the kernel then refuses further memory.
    """
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(base), str(adapter), str(out), str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdin is not None and child.stdout is not None
    while (line := child.stdout.readline().strip()) != "ready":
        assert child.poll() is None, line
    before = peak = _anonymous(child.pid)
    child.stdin.write("go\n")
    child.stdin.flush()
    while child.poll() is None:
        peak = max(peak, _anonymous(child.pid))
        time.sleep(0.01)
    assert child.returncode == 0
    seconds, table = map(float, child.stdout.read().split()[-2:])
    return before, peak, seconds, table


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")), 0)
