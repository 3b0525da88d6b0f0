"""A chat template is a program that came with the model: it runs in transformers' sandbox, and here with a time limit.

What the sandbox lets through and no time limit can stop, because it is one operation, is refused before: powers, and
products that make texts of any length (`'a' * 10**9`). Price: one scan of the template, two timer calls per rendering.
"""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import Environment, TemplateError

from mmft.errors import DataError

SECONDS = 1.5
"""Processor time one rendering may take; real templates take milliseconds."""
_LARGEST_FACTOR = 10_000
_DO = "read the template before you trust it, and pin the revision you have read (model.revision)"


def check_template(template: str, *, where: str) -> None:
    """Raise DataError for operations that can take all memory or time at once."""
    try:
        tokens = [(line, kind, text) for line, kind, text in Environment().lex(template) if kind != "whitespace"]
    except TemplateError:
        return  # transformers says what is wrong with it
    for at, (line, kind, text) in enumerate(tokens):
        if kind != "operator" or text not in ("*", "**"):
            continue
        beside = [tokens[near] for near in (at - 1, at + 1) if 0 <= near < len(tokens)]
        grows = any(
            one == "string" or (one == "integer" and int(value.replace("_", ""), 0) > _LARGEST_FACTOR)
            for _, one, value in beside
        )
        if text == "**" or grows:
            raise DataError(
                f"the chat template computes a {'power' if text == '**' else 'long text'} in line {line}",
                where=where,
                allowed="templates that put messages together",
                do=_DO,
            )


@contextmanager
def time_limit(where: str) -> Iterator[None]:
    """DataError when the block takes more than `SECONDS` of processor time (in the main thread of its process)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: types.FrameType | None) -> None:
        raise DataError(
            f"the chat template ran for more than {SECONDS:g} s and was stopped",
            where=where,
            allowed="templates that put messages together, in milliseconds",
            do=_DO,
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
