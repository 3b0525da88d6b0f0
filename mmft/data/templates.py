"""A chat template is a program that came with the model: it runs in transformers' sandbox, and here with a time limit.

What the sandbox lets through and no time limit can stop, because it is one operation, is refused before: powers and
large products (`'a' * 10**9`). Memory is not bounded otherwise: a loop may fill it for as long as the limit lasts.
Price: one scan of the template, four calls of the system per rendering.
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
    """Raise DataError for a power, a factor above 10,000, and a text times what is no plain number or name."""
    try:
        tokens = [(line, kind, text) for line, kind, text in Environment().lex(template) if kind != "whitespace"]
    except TemplateError:
        return  # transformers says what is wrong with it
    products = 0  # of the block that is open
    for at, (line, kind, text) in enumerate(tokens):
        if kind in ("variable_begin", "block_begin"):
            products = 0
        if kind != "operator" or text not in ("*", "**"):
            continue
        products += 1
        beside = [tokens[near][1:] for near in (at - 1, at + 1) if 0 <= near < len(tokens)]
        large = any(one == "integer" and int(value.replace("_", ""), 0) > _LARGEST_FACTOR for one, value in beside)
        of_text = any(one == "string" for one, _ in beside)
        plain = all(one in ("string", "integer", "name") for one, _ in beside)
        if text == "**" or large or (of_text and not plain) or products > 2:
            raise DataError(
                f"the chat template computes a {'power' if text == '**' else 'large product'} in line {line}",
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
