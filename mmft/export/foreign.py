"""The names that other tools and older versions put around a module's name in an adapter file.

DDP writes `module.`, torch.compile (axolotl, TRL) `_orig_mod.`, FSDP `_fsdp_wrapped_module.`, checkpointing
`_checkpoint_wrapped_module.`, a second peft wrap another `base_model.model.`; an adapter saved from a state dict keeps
its adapter's name (`lora_A.default.weight`). Names of older transformers layouts are `names.py`'s affair.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PEFT = "base_model.model."
_LEADING = (_PEFT, "module.", "base_model.")
_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_WRAPPER = r"\.(?:modules_to_save|ln_tuning_layers)"
_INNER = ".base_layer"


@dataclass(frozen=True)
class Spelling:
    """One way to read a key's module or parameter; `depth` counts `.base_layer` at its end."""

    name: str
    depth: int = 0


def split_key(key: str, parts: tuple[str, ...]) -> tuple[str, str | None]:
    """`…q_proj.lora_A.default.weight` -> (`…q_proj`, `lora_A.weight`); (the whole key, None) for a plain parameter.

    The module is empty for tensors that all modules share (VeRA's A and B).
    """
    key = _ANYWHERE.sub("", key)
    names = "|".join(sorted(map(re.escape, parts), key=len, reverse=True))
    found = re.fullmatch(
        rf"(?:(?P<module>.+?)\.)?(?:token_adapter\.)?(?P<part>{names})"
        r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<leaf>\.weight|\.bias)?",
        key,
    )
    if not found:
        return key, None
    module = found["module"] or ""
    shared = module in ("", "base_model")
    return "" if shared else module, found["part"] + (found["leaf"] or "")


def spellings(name: str) -> list[Spelling]:
    """What a key's module may mean, the most literal first."""
    name = _ANYWHERE.sub("", name)
    found: list[Spelling] = []
    candidates: list[str] = []
    for wrapper in (rf"{_WRAPPER}(?=\.)", rf"{_WRAPPER}\.[^.]+(?=\.)"):  # without and with the adapter's name behind it
        shorter: str | None = re.sub(wrapper, "", name).removeprefix(_PEFT)
        while shorter is not None:
            candidates.append(shorter)
            shorter = _shorter(shorter)
    for candidate in (*candidates, name):
        stem, depth = candidate, 0
        while stem.endswith(_INNER):
            stem, depth = stem.removesuffix(_INNER), depth + 1
        spelling = Spelling(stem.replace(f"{_INNER}.", "."), depth)
        if spelling not in found:
            found.append(spelling)
    return found


def _shorter(name: str) -> str | None:
    return next((name.removeprefix(prefix) for prefix in _LEADING if name.startswith(prefix)), None)
