"""Results as short plain texts for a terminal."""

from __future__ import annotations

from typing import Any

from mmft.errors import Problem


def grid(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Aligned columns; numbers to the right."""
    cells = [columns, *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]

    def line(row: list[str]) -> str:
        padded = [
            cell.rjust(width) if index and _numeric(cell) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return [line(columns), "  ".join("-" * width for width in widths), *(line(row) for row in rows)]


def _numeric(cell: str) -> bool:
    return bool(cell) and cell[0] in "+-0123456789"


def _score(score: dict[str, Any] | None) -> str:
    if not score:
        return "-"
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def summary_text(report: dict[str, Any]) -> str:
    """Scores of each set by model, what the merge proved, where the page is."""
    lines = [f"run {report['name']}"]
    rows: list[list[str]] = []
    models = list(report.get("scores", {}))
    for name, one in report.get("sets", {}).items():
        for metric in next(iter(one["scores"].values()), {}):
            count = str(next(iter(one["scores"].values()))[metric]["n"])
            rows.append([name, metric, count, *(_score(one["scores"][model].get(metric)) for model in models)])
        headline = report.get("headline")
        for tag, values in one.get("groups", {}).items():
            for value, group in values.items():
                scores = [_score(group["scores"].get(model, {}).get(headline)) for model in models]
                count = str(next(iter(group["scores"].values()))[headline]["n"])
                label = value if "=" in value else f"{tag}={value}"
                rows.append([f"  {label}", str(headline), count, *scores])
    if rows:
        lines += grid(["set", "metric", "rows", *models], rows)
    training = report.get("training", {})
    if training.get("steps"):
        lines.append(
            f"trained {training['steps']} steps in {training['seconds']:.0f} s "
            f"({training['samples_per_second']:.1f} samples/s), peak memory {training['peak_memory'] / 1e9:.2f} GB"
        )
    if report.get("merge"):
        lines.append(merge_text(report["merge"]))
    lines += _probe_lines(report.get("probe")) + _between_lines(report)
    if report.get("page"):
        lines.append(f"report: {report['page']}")
    return "\n".join(lines)


def _probe_lines(probe: dict[str, Any] | None) -> list[str]:
    """What the guard against forgetting saw."""
    if not probe:
        return []
    fallen = f"; it fell further at step {probe['fallen_at']}" if probe["fallen_at"] else ""
    return [
        f"probe {probe['set']}: {probe['metric']} {probe['before']:.3f} before training, {probe['last']:.3f} at the "
        f"last look (a fall of {probe['allowed_drop']:g} is allowed){fallen}"
    ]


def _between_lines(report: dict[str, Any]) -> list[str]:
    """The headline of the models between base and tuned, a line for each set."""
    found = report.get("interpolation")
    if not found:
        return []
    lines = []
    for name, rows in found["sets"].items():
        values = ", ".join(f"{alpha}: {row[report['headline']]['value']:.3f}" for alpha, row in rows.items())
        lines.append(f"{name} from base (0) to tuned (1): {values}")
    return [*lines, f"the model at {found['written']:g}: {found['folder']}"]


def merge_text(merge: dict[str, Any]) -> str:
    """One line about a merge and one or two about its proof."""
    lines = []
    if "tensors" in merge:
        changed = merge["tensors"] - merge["untouched"]
        lines.append(f"merged {changed} of {merge['tensors']} tensors onto {merge['onto']}: {merge['folder']}")
    proof = merge.get("proof") or {}
    if proof:
        words = f"proof: {proof['untouched']} untouched tensors byte-equal, {proof['touched']} recomputed"
        outputs = proof.get("outputs")
        lines.append(words + (f"; {_difference(outputs)}" if outputs else ""))
        if proof.get("outputs_other_base"):
            lines.append(
                f"merged onto {proof['outputs_other_base']['onto']} instead: {_difference(proof['outputs_other_base'])}"
            )
    return "\n".join(lines) or "nothing merged"


def _difference(outputs: dict[str, Any]) -> str:
    return (
        f"outputs differ from the adapter model's by at most {outputs['max_difference']:.2e} "
        f"({outputs['relative']:.1e} of the largest), same best token at {outputs['argmax']:.2%} of "
        f"{outputs['positions']} positions"
    )


def export_text(values: dict[str, Any]) -> str:
    """Where the export is, its files, and what was checked or is missing."""
    lines = [f"{values['format']}: {values['folder']}", *(f"  {name}" for name in values["files"])]
    for name, graph in values.get("graphs", {}).items():
        lines.append(
            f"{name}: onnxruntime differs from torch by at most {graph['max_difference']:.2e} "
            f"({graph['relative']:.1e} of the largest value, allowed {values['tolerance']:.0e})"
        )
    if "architecture" in values:
        count = values["tensors"] + values.get("mmproj_tensors", 0)
        lines.append(f"{count} tensors of {values['architecture']} as {values['type']}, all read back equal")
    return "\n".join([*lines, *(f"note: {note}" for note in values.get("notes", []))])


def inspect_text(values: dict[str, Any]) -> str:
    """The tree of parts with counts, then the linear layers that the given targets hit and what an adapter touches."""
    lines = [f"{values['model_type']} ({values['class']}): {values['parameters']:,} parameters"]
    rows: list[list[str]] = []
    for name, part in values["parts"].items():
        modules = sum(sub["modules"] for sub in part["subparts"].values())
        where = _collapsed(part["modules"])
        tops = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        rows.append([name, f"{part['parameters']:,}", str(modules), str(len(part["linears"])), tops])
        for sub, one in part["subparts"].items():
            rows.append([f"  .{sub}", f"{one['parameters']:,}", str(one["modules"]), str(one["linears"]), ""])
    lines += grid(["part", "parameters", "modules", "linears", "where"], rows)
    if values.get("targets"):
        lines += ["", f"targets hit {len(values['targets'])} linear layers:", *_listed(values["targets"])]
    if values.get("experts"):
        lines += ["", f"and {len(values['experts'])} stacked expert weights:", *_listed(values["experts"])]
    if values.get("adapter"):
        lines += ["", *_adapter_lines(values["adapter"])]
    return "\n".join(lines)


def _adapter_lines(adapter: dict[str, Any]) -> list[str]:
    ranks = ", ".join(map(str, adapter["ranks"]))
    lines = [f"adapter {adapter['folder']}: {adapter['method']}{f' of rank {ranks}' if ranks else ''}"]
    lines[0] += f", {adapter['parameters']:,} parameters"
    rows: list[list[str]] = []
    for name, part in adapter["parts"].items():
        rank = ", ".join(map(str, part["ranks"])) or "-"
        where = _collapsed(part["modules"])
        shown = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        rows.append([name, f"{part['parameters']:,}", str(len(part["modules"])), rank, shown])
        for sub, one in part["subparts"].items():
            rows.append([f"  .{sub}", f"{one['parameters']:,}", str(one["modules"]), "", ""])
    lines += grid(["part", "parameters", "modules", "rank", "where"], rows)
    if adapter["prompt"]:
        lines.append(f"learned prompts: {adapter['prompt']:,} parameters")
    return lines + [f"WARNING: {text}" for text in adapter["warnings"]]


def _listed(names: list[str]) -> list[str]:
    """A few names one by one, many of them collapsed."""
    return names if len(names) <= 40 else _collapsed(names)


def _collapsed(names: list[str]) -> list[str]:
    """Names with their numbers starred and how often: `layers.*.mlp.fc1 x24`; a name that stands alone as it is."""
    groups: dict[str, list[str]] = {}
    for name in names:
        starred = ".".join("*" if step.isdigit() else step for step in name.split("."))
        groups.setdefault(starred, []).append(name)
    return [held[0] if len(held) == 1 else f"{starred} x{len(held)}" for starred, held in groups.items()]


def plan_text(values: dict[str, Any]) -> str:
    """The plan on one screen."""
    lines = [f"plan of {values['name']}: {values['model']['name']} ({values['model']['model_type']})"]
    rows = [[part["part"], f"{part['parameters']:,}", f"{part['trainable']:,}"] for part in values["parts"]]
    lines += grid(["part", "parameters", "trainable"], rows)
    lines += ["", *grid(["part", "what", "mode", "modules", "trained"], values["targets"])]
    if values.get("fast"):
        lines += ["", *grid(["fast path", "", "reason", "saves"], values["fast"])]
    if values.get("data"):
        lines += ["", *grid(["set", "rows"], [[name, f"{count:,}"] for name, count in values["data"].items()])]
    if values.get("tokens"):
        columns = ["tokens per row", "p50", "p90", "p99", "max"]
        rows = [[kind, *(f"{row[key]:,}" for key in columns[1:])] for kind, row in values["tokens"].items()]
        lines += ["", *grid(columns, rows)]
    steps = values["steps"]
    lines += ["", f"steps: {steps['total']:,} of {steps['rows_per_step']} rows ({steps['epochs']:.2f} epochs)"]
    memory = values["memory"]
    lines.append("memory estimate: " + ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in memory.items()))
    lines += [*_probed_lines(values), *(f"note: {note}" for note in values.get("notes", []))]
    return "\n".join(lines)


def _probed_lines(values: dict[str, Any]) -> list[str]:
    """The largest step's memory as estimated and as measured, where it was."""
    found = values.get("probe")
    if not found:
        return []
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in found["parts"].items() if size >= 5e6)
    told = "no estimate for this kind of run"
    if found["estimate"] is not None:
        told = f"estimate {found['estimate'] / 1e9:.2f} GB ({parts}), {found['difference']:+.0%}"
    rows = f"{len(found['rows'])} row{'s' if len(found['rows']) > 1 else ''}"
    again = f", {found['recomputed']} layers computed again" if found["recomputed"] else ""
    return [f"probe step: {found['measured'] / 1e9:.2f} GB measured on the largest {rows}{again}; {told}"]


def fast_text(values: dict[str, Any]) -> str:
    """The plan, and how far each path is from the reference."""
    lines = grid(["fast path", "", "reason", "saves"], values["plan"])
    columns = ["path", "loss differs by", "allowed", "gradients by", "allowed", "", "s/step", "times plain"]
    for precision, paths in values["precisions"].items():
        rows = [
            [
                name,
                *(f"{one[key]:.1e}" for key in ("loss", "allowed_loss", "gradients", "allowed")),
                "ok" if one["ok"] else "NOT EQUAL",
                f"{one['seconds']:.3f}",
                f"{one['speedup']:.2f}",
            ]
            for name, one in paths.items()
        ]
        lines += ["", f"{precision}, {values['batches']} steps, against float32 plain:", *grid(columns, rows)]
    return "\n".join(lines)


def check_text(values: dict[str, Any]) -> str:
    """The result for a terminal: a table by cause with the first lines of each, and what was written."""
    lines = [f"{values['rows']} rows looked at in {values['seconds']:.1f} s, {values['bad']} bad"]
    if values["causes"]:
        cells = [
            [one["cause"], str(one["rows"]), ", ".join(one["first"]), str(one["reason"])[:80]]
            for one in values["causes"]
        ]
        lines += grid(["cause", "rows", "first", "reason of the first"], cells)
        lines.append(f"every bad row with its reasons: {values['bad_rows']}")
    for one in values["fixed"]:
        lines.append(f"{one['rows']} good rows: {one['file']} (media_root: {one['media_root']})")
    if values["do"]:
        lines += Problem("", do=values["do"]).lines()[1:]
    return "\n".join([*lines, *values["notes"]])
