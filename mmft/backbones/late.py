"""bitsandbytes without inductor at import.

peft imports bitsandbytes wherever it is installed, and bitsandbytes decorates four functions with `torch.compile`,
which imports `torch._inductor` then and there: 47 MB and a second of every start, for functions that only 4-bit and
8-bit layers call. Here they are compiled as before, at their first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def load_bitsandbytes() -> None:
    """Import bitsandbytes, if it is installed, with its compiled functions made at their first call."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    import torch

    compiler = torch.compile
    torch.compile = functools.partial(_later, compiler)
    try:
        importlib.import_module("bitsandbytes")
    except Exception:  # peft meets the same error, and says what it thinks of it
        sys.modules.pop("bitsandbytes", None)
    finally:
        torch.compile = compiler


def _later(compiler: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any) -> Any:
    if function is None:
        return functools.partial(_later, compiler, **options)
    made: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(compiler(function, **options))
        return made[0](*args, **kwargs)

    return call
