"""F13 to F15: poisoned weights, code in model folders, hostile recipes."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.trial import Fault, Tally, answer, expect, finish, recipe, shelf, start, train, wait

# ---------------------------------------------------------------- poisoned weights


class Poison:
    """Unpickling it makes the file `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickles(canary: Path) -> dict[str, bytes]:
    """Files that run code in readers that unpickle."""
    plain = pickle.dumps({"weight": Poison(canary)}, protocol=2)
    zipped, npz, nested, npy = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3\n")
    npy.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", 64))
    npy.write(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(63) + b"\n" + plain)
    with zipfile.ZipFile(npz, "w") as archive:
        archive.writestr("a.npy", npy.getvalue())
    with zipfile.ZipFile(nested, "w") as archive:
        archive.writestr("inner.zip", zipped.getvalue())
    return {
        "a plain pickle": plain,
        "torch's zip": zipped.getvalue(),
        "npz": npz.getvalue(),
        "npy": npy.getvalue(),
        "zip in zip": nested.getvalue(),
        "protocol 0": pickle.dumps({"w": Poison(canary)}, protocol=0),
        "protocol 5": pickle.dumps({"w": Poison(canary)}, protocol=5),
        "a pickle behind a header": struct.pack("<Q", 2) + b"{}" + plain,
    }


def headers() -> dict[str, bytes]:
    """safetensors files that lie about themselves."""

    def file(header: Any, body: bytes = bytes(64)) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    def tensor(start: int, end: int, kind: str = "F32", shape: tuple[int, ...] = (8,)) -> dict[str, Any]:
        return {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}

    many = ",".join(f'"name{n:07d}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(1_000_000))
    return {
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}" + bytes(64),
        "a header of 200 MB, stated": struct.pack("<Q", 200_000_000) + b"{}" + bytes(64),
        "overlap": file({"a": tensor(0, 32), "b": tensor(16, 48)}),
        "hole": file({"a": tensor(0, 32), "b": tensor(48, 64, shape=(4,))}),
        "unknown type": file({"a": tensor(0, 32, "OBJECT")}),
        "negative": file({"a": tensor(-32, 0)}),
        "more than the file": file({"a": tensor(0, 2**40, shape=(2**38,))}),
        "shape and bytes differ": file({"a": tensor(0, 32, shape=(9,))}),
        "a million names": file(("{" + many + "}").encode(), b""),
        "no JSON": file(b"[[[[[[[[[[[["),
    }


def poisoned(tally: Tally, count: int) -> None:
    """F13: pickles and lying headers in the place of base, adapter and checkpoint; nothing runs, all is refused."""
    place = shelf(tally.folder)
    canary = tally.folder / "canary"

    def adapter() -> None:
        from mmft.adapters.build import build_adapters
        from mmft.adapters.store import save_adapter
        from mmft.backbones.fingerprint import fingerprint
        from mmft.backbones.load import load_backbone
        from mmft.recipe.schema import AdapterSection, ModelSection

        section = ModelSection(name_or_path=str(place / "model"), dtype="float32")
        adapted = build_adapters(load_backbone(section), AdapterSection(targets=("language.attention",)), seed=0)
        (tally.folder / "adapter").mkdir(exist_ok=True)
        save_adapter(
            adapted,
            tally.folder / "adapter",
            base_name=str(place / "model"),
            base_fingerprint=fingerprint(place / "model"),
            recipe_digest="r",
        )

    expect(finish(adapter, tally.folder / "log") == 0, (tally.folder / "log").read_text()[-800:])
    cases: list[tuple[str, str, str, bytes]] = []
    for name, data in pickles(canary).items():
        for where, file in (
            ("adapter", "adapter_model.bin"),
            ("adapter", "adapter_model.safetensors"),
            ("model", "pytorch_model.bin"),
            ("checkpoint", "optimizer.safetensors"),
            ("checkpoint", "optimizer.pt"),
        ):
            cases.append((name, where, file, data))
    for name, data in headers().items():
        cases += [(name, "adapter", "adapter_model.safetensors", data), (name, "model", "model.safetensors", data)]
        cases.append((name, "checkpoint", "trainable.safetensors", data))
    if count < len(cases):
        cases = [one for one in cases if one[0] == "a million names"] + tally.draw.sample(cases, count)
    for name, where, file, data in cases:
        with tally.trial(f"{name} as {where}/{file}"):
            folder = tally.place("poisoned")
            seen = answer(
                lambda where=where, file=file, data=data, folder=folder: _swallow(  # type: ignore[misc]
                    tally.folder, folder, where, file, data
                ),
                tally.folder,
                seconds=60,
            )
            expect(not canary.exists(), "code was run")
            expect(seen["refused"], f"it was read: {seen}")
            expect(seen["grown"] < 100, f"{seen['grown']:.0f} MB")
            expect(seen["cpu"] < 1.0, f"{seen['cpu']:.2f} s")
            tally.measure(seen["cpu"])


def _swallow(shelf_of: Path, folder: Path, where: str, file: str, data: bytes) -> dict[str, Any]:
    import resource

    from mmft.errors import MmftError

    source = {"adapter": shelf_of / "adapter", "model": shelf_of / "shelf" / "model"}.get(where)
    place = folder / where
    if source is not None:
        shutil.copytree(source, place)
        for weights in place.glob("*.safetensors"):
            weights.unlink()
        (place / file).write_bytes(data)
        work = _load_adapter if where == "adapter" else _load_model
    else:
        from tests.faults.saving import save

        save(place, 1)
        step = place / "step-000001"
        (step / "trainable.safetensors").unlink() if file.endswith(".pt") else None
        (step / file).write_bytes(data)
        from mmft.files import write_manifest

        (step / "MANIFEST.json").unlink()
        write_manifest(step)
        work = _load_checkpoint
    work_with = _prepared(work, shelf_of)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    refused = False
    try:
        work_with(place)
    except MmftError:
        refused = True
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"refused": refused, "grown": grown, "cpu": time.process_time() - begin}


def _prepared(work: Callable[..., None], shelf_of: Path) -> Callable[[Path], None]:
    """What is not the reading of the poisoned file is done before the clock starts."""
    from mmft.backbones.load import load_backbone
    from mmft.recipe.schema import ModelSection

    section = ModelSection(name_or_path=str(shelf_of / "shelf" / "model"), dtype="float32")
    if work is _load_model:
        load_backbone(section)
        return _load_model
    if work is _load_adapter:
        backbone = load_backbone(section)
        return lambda place: _load_adapter(place, backbone)
    return _load_checkpoint


def _load_adapter(place: Path, backbone: Any) -> None:
    from mmft.adapters.store import load_adapter

    load_adapter(backbone, place)


def _load_model(place: Path) -> None:
    from mmft.backbones.load import load_backbone
    from mmft.recipe.schema import ModelSection

    load_backbone(ModelSection(name_or_path=str(place), dtype="float32"))


def _load_checkpoint(place: Path) -> None:
    import torch

    from mmft.engine.checkpoint import load_checkpoint, newest_valid

    found = newest_valid(place, warn=lambda _: None)
    params = {name: torch.nn.Parameter(torch.zeros(40, 30)) for name in ("a.weight", "b.weight")}
    if found is not None:
        load_checkpoint(found, trainable=params, optimizer=torch.optim.AdamW(params.values()))


# ---------------------------------------------------------------- code in model folders

TEMPLATES = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "a long range": "{% for a in range(10**9) %}x{% endfor %}",
    "ranges in ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "many loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a power": "{{ 9**9**9 }}",
    "a long text": "{{ 'a' * 99999999999 }}",
    "a text by a number": "{{ messages[0].role * 99999999999 }}",
    "imports": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "no end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


def code(tally: Tally, count: int) -> None:
    """F14: `auto_map` of config, model, tokenizer, processor; templates that reach out or do not end."""
    place = shelf(tally.folder)
    canary = tally.folder / "canary"
    evil = f"import pathlib; pathlib.Path({str(canary)!r}).touch()\nraise SystemExit('was run')\n"
    cases: list[tuple[str, Callable[[Path], None]]] = []
    for file, key, name in (
        ("config.json", "AutoConfig", "config"),
        ("config.json", "AutoModelForImageTextToText", "model"),
        ("tokenizer_config.json", "AutoTokenizer", "tokenizer"),
        ("processor_config.json", "AutoProcessor", "processor"),
    ):
        for native in (True, False):
            cases.append(
                (f"auto_map of the {name}{'' if native else ', type unknown'}", _auto_map(file, key, native, evil))
            )
    for name, template in TEMPLATES.items():
        cases.append((f"template: {name}", _template(template.replace("CANARY", str(canary)))))
    if count < len(cases):
        cases = [one for one in cases if one[0].endswith("many loops")] + tally.draw.sample(cases, count)
    for name, change in cases:
        with tally.trial(name):
            folder = tally.place("code")
            shutil.copytree(place / "model", folder / "model")
            change(folder / "model")
            values = recipe(tally, {"model.name_or_path": str(folder / "model"), "train.max_steps": 1})
            begin = time.monotonic()
            pid = start(train(values, folder), folder / "log", environment={"HF_HUB_OFFLINE": "1"})
            status = wait(pid, seconds=60)
            text = (folder / "log").read_text()
            expect(not canary.exists(), "code was run")
            if name.startswith("auto_map") and status == 0:
                continue  # transformers has the class itself, and the code is not looked at
            expect(status in (3, 7), f"exit {status}: {text[-600:]}")
            expect("Traceback" not in text, text[-600:])
            if name.startswith("template"):
                tally.measure(time.monotonic() - begin)
                told = (
                    "chat_template" in text or "chat template" in text or "SecurityError" in text or "refused" in text
                )
                expect(told, f"the template is not named: {text[-500:]}")


def _auto_map(file: str, key: str, native: bool, evil: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        values = json.loads(path.read_text()) if path.is_file() else {}
        values["auto_map"] = {key: [None, "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"}
        if not native:
            if file == "config.json":
                values["model_type"] = "exotic_vl"
            values["tokenizer_class"] = values["processor_class"] = "EvilThing"
        path.write_text(json.dumps(values))
        (folder / "evil.py").write_text(evil)

    return change


def _template(template: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        good = path.read_text() if path.is_file() else ""
        path.write_text(template + good)

    return change


# ---------------------------------------------------------------- hostile recipes


def recipes(tally: Tally, count: int) -> None:
    """F15: each is one RecipeError with its place, soon and in little memory, without torch's work."""
    from tests.recipe.test_hostile import HOSTILE

    names = sorted(HOSTILE)
    if count < len(names):
        names = ["laughs in lists", *tally.draw.sample(names, count)]
    place = tally.place("recipes")
    (place / "rows.jsonl").write_text("{}\n")
    for name in names:
        text, expected = HOSTILE[name]
        with tally.trial(name):
            seen = answer(lambda text=text: _load(place, text), tally.folder, seconds=30)  # type: ignore[misc]
            expect(expected in seen["error"], f"another error: {seen['error'][:300]}")
            expect("  at      r.yaml" in seen["error"], "no place is named")
            expect(seen["cpu"] < 0.5, f"{seen['cpu']:.2f} s")
            expect(seen["grown"] < 100, f"{seen['grown']:.0f} MB")
            expect(not (place / "canary").exists(), "code was run")
            tally.measure(seen["cpu"])


def _load(place: Path, text: str | bytes) -> dict[str, Any]:
    import resource

    from mmft.errors import RecipeError
    from mmft.recipe.load import load_recipe

    os.chdir(place)
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    before, begin, error = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), ""
    try:
        load_recipe("r.yaml", ())
    except RecipeError as caught:
        error = str(caught)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"error": error, "cpu": time.process_time() - begin, "grown": grown}


FAULTS = (
    Fault("F13", "pickles and lying safetensors headers in three places", 100, 14, "s", poisoned),
    Fault("F14", "code in model folders, templates that do not end", 20, 8, "s for a whole run", code),
    Fault("F15", "hostile recipes", 100, 20, "s", recipes),
)
MUTANTS = (
    ("F13", "mmft/headers.py", "    if stated > MOST_HEADER:", "    if False:"),
    ("F14", "mmft/data/templates.py", "    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)", "    pass"),
    ("F15", "mmft/recipe/nodes.py", "        self.limit(node.size, mark)", "        pass"),
)
