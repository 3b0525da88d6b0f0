"""bitsandbytes is there without inductor, and what it compiles is compiled at its first call."""

from __future__ import annotations

import subprocess
import sys

from mmft.backbones.late import _later

SCRIPT = """
import sys, torch
compile = torch.compile
import mmft.adapters.build
assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
assert torch.compile is compile
"""


def test_inductor_is_not_imported_at_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_function_is_compiled_once_and_late() -> None:
    made: list[dict[str, bool]] = []

    def compiler(function, **options):
        made.append(options)
        return lambda *args: ("compiled", function(*args))

    plain = _later(compiler, len)
    dynamic = _later(compiler, dynamic=False)(len)
    assert not made
    assert plain("abc") == plain("xyz") == dynamic("abc") == ("compiled", 3)
    assert made == [{}, {"dynamic": False}]
