"""The house rules of mmft that can be read off its files: floors, sizes, forbidden calls, knobs, recipes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from mmft.recipe.check_objective import FUSION_READS_NOT
from mmft.recipe.check_online import ONLINE_READS_NOT
from mmft.recipe.check_pairs import JOINT_READS_NOT, ONLY_PAIRS_READ, PAIRS_READ_NOT
from mmft.recipe.load import load_recipe
from mmft.recipe.normal import bare, sections
from mmft.recipe.objective import READS
from mmft.recipe.schema import DataSource, PartAdapter, Recipe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmft"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".c", ".cpp", ".h"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

FLOORS = {
    "errors": 0,
    "headers": 0,
    "paths": 0,
    "lock": 0,
    "digests": 0,
    "files": 0,
    "seeds": 0,
    "journal": 0,
    "quiet": 0,
    "recipe": 1,
    "backbones": 2,
    "data": 2,
    "fusion": 2,
    "adapters": 3,
    "objectives": 3,
    "fast": 4,
    "engine": 5,
    "evaluation": 5,
    "export": 5,
    "runfolder": 6,
    "kinds": 6,
    "stages": 6,
    "outcome": 6,
    "run": 6,
    "planning": 6,
    "probing": 6,
    "checking": 6,
    "converting": 6,
    "tracing": 6,
    "answer": 6,
    "prove": 6,
    "replay": 6,
    "summary": 6,
    "fitting": 6,
    "cli": 7,
    "__main__": 7,
    "__init__": 7,
}
"""Every top-level room and file of the package. A file imports its own room and lower floors."""

TOGETHER = {
    0: "plain files: files stands on lock, paths, digests and errors, journal on files",
    6: "chapters: run reads runfolder, kinds, stages and outcome; tracing, planning, prove, answer reuse the stages",
    7: "cli calls the functions of mmft, __main__ calls cli",
}
"""Floors on which the rooms are single files of one subject, and why they may import each other."""

KEPT_APART: dict[tuple[str, str], str] = {}
"""(importer, imported) of rooms on one floor that are allowed, with the reason; none is needed."""

FIELDS = {
    "": "name",
    "model": "name_or_path encoders revision model_type dtype attn_implementation",
    "quantization": "load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype"
    " parts",
    "adapter": "method targets layers exclude lora_rank lora_alpha lora_dropout use_rslora use_dora init_lora_weights"
    " loraplus_lr_ratio oft_block_size num_virtual_tokens bottleneck_size bottleneck_placement modules_to_save"
    " init_from parts",
    "adapter.parts.*": "mode lora_rank lora_alpha learning_rate",
    "data": "train eval temperature max_length over_length system supervise max_image_pixels video_frames augmentation"
    " max_bad_fraction",
    "data.train.*": "path name format media_root num_samples weight streaming repeat columns",
    "objective": "name",
    "objective: sft": "label_smoothing_factor",
    "objective: contrastive": "loss captions_per_image train_logit_scale cache_features probe_set probe_max_drop"
    " probe_action",
    "objective: reward": "margin centre_weight answer_weight",
    "objective: dpo": "beta precompute_reference loss_type label_noise image_weight rejected_image sft_weight",
    "objective: kto": "beta precompute_reference desirable_weight undesirable_weight",
    "objective: orpo": "beta",
    "objective: simpo": "beta gamma",
    "objective: cpo": "beta sft_weight",
    "objective: captioning": "label_smoothing_factor captions_per_image prompt",
    "objective: classification": "label_smoothing_factor task classes strategy pooling hidden_size modality_dropout"
    " auxiliary_weight modality_learning_rates balance focal_gamma cache_features",
    "objective: joint": "loss captions_per_image train_logit_scale joint_weights decoder_layers",
    "objective: dual": "loss captions_per_image train_logit_scale joint_weights decoder_layers consistency"
    " consistency_weight",
    "objective: mlm": "",
    "objective: grpo": "rewards num_generations temperature kl_coef clip num_iterations variant",
    "objective: rloo": "rewards num_generations temperature kl_coef clip num_iterations",
    "objective: ppo": "rewards num_generations temperature kl_coef clip num_iterations gae_lambda value_coef",
    "train": "output_dir seed per_device_train_batch_size gradient_accumulation_steps effective_batch_size"
    " num_train_epochs max_steps learning_rate lr_scheduler_type warmup_ratio weight_decay adam_beta1 adam_beta2"
    " adam_epsilon max_grad_norm skip_nonfinite_steps bf16 gradient_checkpointing memory_budget logging_steps"
    " eval_steps save_steps save_total_limit early_stopping_patience load_best_model_at_end fast packing"
    " train_sampling_strategy dataloader_num_workers ddp_timeout report_to",
    "evaluate": "models metrics per_device_eval_batch_size max_new_tokens num_beams top_p temperature group_by"
    " class_tag templates bootstrap_samples",
    "export": "merge merge_onto dtype max_shard_size interpolate verify_rows",
}
"""Every knob of a recipe. A new one is added here on purpose, with a test of what it does."""

MOST_FIELDS = 107  # memory_budget: how many layers are recomputed follows from it
"""What the recipe of one objective can hold; fields of other objectives are refused there, so nobody meets them all."""
LONGEST_FILE, LONGEST_FUNCTION, MOST_POSITIONAL = 400, 70, 6
LONGEST_KERNEL, WIDEST = 250, 120
ALLOWED_LOAD = ("mmft/backbones/shipped.py", "_tower_weights")
"""The one place that reads a pickle: a pinned file of a pip package, after its sha256, with weights_only."""


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def _room(module: str) -> str:
    """`mmft.data.render` -> data; `mmft` itself is its `__init__`."""
    return (module.split(".") + ["__init__"])[1]


@cache
def _modules() -> frozenset[str]:
    return frozenset(_module(path) for path in SOURCES)


def _imported(path: Path, *, at_load_only: bool = False) -> Iterator[str]:
    """Modules of the package that a file imports, anywhere in it (or only when it is itself imported)."""
    for node in _loaded_nodes(_tree(path)) if at_load_only else ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "mmft")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno} imports relatively"
            if (node.module or "").split(".")[0] == "mmft":
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield whole if whole in _modules() else str(node.module)


def _loaded_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run on import: nothing in functions, nothing below `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _loaded_nodes(node)


def _functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(_tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


# ---------------------------------------------------------------- floors


def test_every_room_has_a_floor():
    assert {_room(_module(path)) for path in SOURCES} == set(FLOORS)


def test_imports_point_down():
    wrong = []
    for path in SOURCES:
        here = _room(_module(path))
        for module in _imported(path):
            there = _room(module)
            if there != here and FLOORS[there] > FLOORS[here]:
                wrong.append(f"{_name(path)} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})")
    assert not wrong, "\n".join(wrong)


def test_rooms_of_one_floor_keep_apart():
    wrong = []
    for path in SOURCES:
        here = _room(_module(path))
        for module in _imported(path):
            there = _room(module)
            allowed = FLOORS[here] in TOGETHER or (here, there) in KEPT_APART
            if there != here and FLOORS[there] == FLOORS[here] and not allowed:
                wrong.append(f"{_name(path)} imports {module}: both stand on floor {FLOORS[here]}")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_import_circle():
    """Imports in functions count too: a circle that is only put off is still one."""
    edges = {_module(path): sorted(set(_imported(path)) - {_module(path)}) for path in SOURCES}
    edges["mmft"] = edges.pop("mmft.__init__")
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, "circle: " + " -> ".join((*above[above.index(module) :], module))
        if module in done:
            return
        for target in edges.get(module, ()):
            visit(target, (*above, module))
        done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize(
    "floor_file", [path for path in SOURCES if FLOORS.get(_room(_module(path)), 9) <= 1], ids=_name
)
def test_low_floors_import_nothing_heavy(floor_file):
    heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "matplotlib", "evaluate", "bitsandbytes"}
    for node in _loaded_nodes(_tree(floor_file)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not heavy & {name.split(".")[0] for name in names}, f"{_name(floor_file)}:{node.lineno}"


def test_the_door_opens_without_torch():
    """A process of its own, because pytest's has imported torch long ago."""
    code = (
        "import sys, mmft, mmft.cli, mmft.recipe.load\n"
        f"mmft.validate({str(RECIPES[0])!r})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_sizes(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{_name(path)} has {lines} lines"
    for function in _functions(path):
        where = f"{_name(path)}:{function.lineno} {function.name}"
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= LONGEST_FUNCTION, f"{where} has {length} lines"
        positional = [*function.args.posonlyargs, *function.args.args]
        given = [argument for argument in positional if argument.arg not in ("self", "cls")]
        if not _is_command(function):
            assert len(given) <= MOST_POSITIONAL, f"{where} has {len(given)} positional parameters"


@pytest.mark.parametrize("path", KERNELS, ids=_name)
def test_sources_in_c_are_short_told_and_shipped(path):
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= LONGEST_KERNEL and max(map(len, lines)) <= WIDEST and "\t" not in text
    assert text.startswith("/* ") and path.parent == PACKAGE / "fast" / "native"
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert any(path in PACKAGE.glob(pattern) for pattern in data["mmft"]), f"{_name(path)} is not in a wheel"


def _is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """typer reads options from ordinary parameters."""
    return any(ast.unparse(decorator) == "app.command()" for decorator in function.decorator_list)


# ---------------------------------------------------------------- what is never written


def _calls(path: Path) -> Iterator[tuple[str, str, ast.Call]]:
    """(function it stands in, dotted name called, node)."""
    inside = {id(node): function.name for function in _functions(path) for node in ast.walk(function)}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Call):
            yield inside.get(id(node), ""), ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_forbidden_is_called(path):
    never = {"print", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "breakpoint"}
    for function, name, call in _calls(path):
        where = f"{_name(path)}:{call.lineno} {name}"
        assert name not in never, where
        for keyword in call.keywords:
            true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            assert not (true and keyword.arg in ("shell", "trust_remote_code")), f"{where}({keyword.arg}=True)"
        if name.endswith("torch.load"):
            assert (_name(path), function) == ALLOWED_LOAD, where
            assert "weights_only=True" in ast.unparse(call), where


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_no_pickle_and_no_swallowed_exception(path):
    for node in ast.walk(_tree(path)):
        where = f"{_name(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"} & names, where
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where} bare except"
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            empty = all(isinstance(line, ast.Pass | ast.Continue) for line in node.body)
            assert not (broad and empty), f"{where} swallows every exception"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "contextlib.suppress":
            assert not {"Exception", "BaseException"} & {ast.unparse(kind) for kind in node.args}, where


def _tracked() -> list[Path]:
    """Text files that belong to the project, by folder: tests run where git may not know the checkout."""
    suffixes = (".py", ".c", ".h", ".toml", ".yaml", ".yml", ".json", ".jsonl", ".j2", ".md", ".cfg", ".sh")
    folders = [ROOT / name for name in ("mmft", "recipes", "tests", ".ci")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    top = [ROOT / name for name in ("Makefile", "README.md", "pyproject.toml", ".gitignore", "LICENSE")]
    return sorted(path for path in (*found, *top) if path.is_file() and "__pycache__" not in path.parts)


def test_no_machine_is_named():
    """No home, work or temporary folder of a machine, and no package registry but the public default."""
    slash = "/"
    machine = re.compile(
        rf"(?<![\w.~-]){slash}(work|root|home|Users|mnt|scratch){slash}"
        rf"|(?<![\w.~-]){slash}tmp{slash}\w"
        rf"|index-url|trusted-host|PIP_INDEX|(?:pypi|registry|artifactory|nexus|devpi)[\w.-]*:{slash}{slash}"
    )
    wrong = []
    for path in _tracked():
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if found := machine.search(line):
                wrong.append(f"{_name(path)}:{number} {found[0]!r}")
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- docstrings


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_what_is_public_is_explained(path):
    tree = _tree(path)
    if not tree.body:  # an empty __init__.py
        return
    assert ast.get_docstring(tree), f"{_name(path)} has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{_name(path)}:{node.lineno} {node.name} has no docstring"


# ---------------------------------------------------------------- knobs


def _fields() -> dict[str, set[str]]:
    inner = {"adapter.parts.*": PartAdapter, "data.train.*": DataSource}
    top = {name for name in Recipe.model_fields if name not in sections()}
    found = {"": top} | {name: set(kind.model_fields) for name, kind in {**sections(), **inner}.items()}
    for name, groups in READS.items():
        found[f"objective: {name}"] = {field for group in groups for field in group.model_fields}
        found["objective"] -= found[f"objective: {name}"]
    return found


def test_the_knobs_are_those_of_the_list():
    assert _fields() == {section: set(names.split()) for section, names in FIELDS.items()}


def test_the_knobs_stay_within_their_budget():
    fields = _fields()
    common = sum(len(names) for section, names in fields.items() if not section.startswith("objective: "))
    refused = {name: len(ONLY_PAIRS_READ) for name in READS}
    refused["classification"] += len(FUSION_READS_NOT)
    refused["mlm"] += len(PAIRS_READ_NOT)
    refused |= {name: refused[name] + len((*JOINT_READS_NOT, "evaluate.group_by")) for name in ("joint", "dual")}
    refused["contrastive"] = len(PAIRS_READ_NOT) + len(("evaluate.metrics", "evaluate.group_by"))
    refused |= {name: refused[name] + len(ONLINE_READS_NOT) for name in ("grpo", "rloo", "ppo")}
    refused["dpo"] += len(("data.supervise",))
    for name in READS:
        assert common + len(fields[f"objective: {name}"]) - refused.get(name, 0) <= MOST_FIELDS, name


def test_every_knob_is_explained():
    for kind in (Recipe, PartAdapter, DataSource, *sections().values()):
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name} has no docstring"


def test_no_section_hides_deeper_ones():
    """Nesting stops at the two lists of the schema, so `FIELDS` above is complete."""
    for kind in sections().values():
        for name, field in kind.model_fields.items():
            found = bare(field.annotation)
            assert not (isinstance(found, type) and issubclass(found, BaseModel)), f"{kind.__name__}.{name}"


def test_every_knob_is_read():
    """Some file outside of the recipe's own room names each field; a knob that nothing reads is a defect."""
    read = {
        node.attr
        for path in SOURCES
        if _room(_module(path)) != "recipe"
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = {f"{section}.{name}" for section, names in _fields().items() for name in names if name not in read}
    assert not unread


# ---------------------------------------------------------------- recipes


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_recipe_is_valid(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    # A recipe may go on from what another one leaves in its run folder, which is not there before that run.
    later = str((given.get("model") or {}).get("name_or_path", "")).startswith("runs/")
    recipe = load_recipe(path, ["model.name_or_path=shipped:nano-vlm"] if later else [])
    assert recipe.name == given.get("name", path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_recipe_header_tells_what_a_run_takes(path):
    """Comment lines at the top: hardware, memory, time, and whether it was run."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]
    for label in ("hardware", "memory", "time", "was run"):
        told = [line.removeprefix(label).strip() for line in head if line.startswith(f"{label} ")]
        assert told, f"{_name(path)} does not state its {label}"
    stated = next(line.removeprefix("was run").strip() for line in head if line.startswith("was run "))
    assert re.match(r"(yes|no)\b", stated), f"{_name(path)}: 'was run' starts with {stated[:20]!r}, not yes or no"
