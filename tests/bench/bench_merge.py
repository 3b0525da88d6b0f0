"""Memory and time of the streaming merge against `cp -r` of the same folder, both synced.

Random bf16 llava folders with a 260 MB embedding table and a rank 16 adapter on one tensor, on all of attention, or on
every language projection; copy and merge alternate, so that both meet the machine in the same moods. A merge is all of
`merge_adapter`, to the synced folder with its manifest, in its own process after the imports and after transformers
has built its table of renamings (as any process has that loaded a model; the table's seconds are in the last column).
Prints one table; deletes what it wrote. Run: make bench-merge [SIZES=1200,6000 ROUNDS=3] (sizes in MB).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmft.files import verify_folder
from tests.export.big import big_pair, part_of, watched_merge

ROUNDS = int(os.environ.get("ROUNDS", "3"))
LIMIT = 768 << 20  # RLIMIT_DATA above the imports; RLIMIT_AS would count the mapped libraries and files


def copy_seconds(base: Path, out: Path) -> float:
    """Seconds of `cp -r` and of syncing what it wrote."""
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    for path in out.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    return time.monotonic() - started


SETTINGS = {
    "one tensor": "layers.0.self_attn.k_proj",
    "attention": "self_attn",
    "every projection": "proj",
}


def measure(folder: Path, megabytes: int) -> list[list[str]]:
    """Rows of the table."""
    base, adapter = big_pair(folder, megabytes=megabytes, hidden=2048, vocabulary=64000)
    total = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found = []
    for number, (setting, part) in enumerate(SETTINGS.items()):
        chosen = part_of(adapter, folder / f"adapter{number}", part)
        copies, merges, tables, growth = [], [], [], 0
        for turn in range(ROUNDS):
            copies.append(copy_seconds(base, folder / "copy"))
            shutil.rmtree(folder / "copy")
            limit = LIMIT if turn == 0 else 0
            before, peak, seconds, table = watched_merge(base, chosen, folder / "merged", limit=limit)
            growth = max(growth, peak - before)
            merges.append(seconds)
            tables.append(table)
            if turn == 0:
                verify_folder(folder / "merged")
            shutil.rmtree(folder / "merged")
        pairs = ", ".join(f"{m / c:.2f}" for m, c in zip(merges, copies, strict=True))
        found.append(
            [
                f"{total / 1e9:.2f} GB",
                setting,
                f"{growth / 2**20:.0f} MB",
                f"{min(copies):.1f} s",
                f"{min(merges):.1f} s",
                f"{min(merges) / min(copies):.2f}",
                f"{median(merges) / median(copies):.2f}",
                pairs,
                f"{min(tables):.2f} s",
            ]
        )
    return found


def main() -> None:
    """Print the table."""
    sizes = [int(size) for size in os.environ.get("SIZES", "1200,6000").split(",")]
    load = os.getloadavg()[0]
    rows = [
        [
            "checkpoint",
            "adapter on",
            "memory above imports",
            "cp -r, synced",
            "merge",
            "ratio of the best",
            "of the medians",
            "ratio per round",
            "once per process",
        ]
    ]
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="mmft-merge-") as name:
            rows += measure(Path(name), size)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
    text = f"first merge of each size under RLIMIT_DATA of {LIMIT >> 20} MB above the imports"
    sys.stdout.write(
        f"{ROUNDS} rounds, best of each; {text}; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after\n"
    )


if __name__ == "__main__":
    main()
