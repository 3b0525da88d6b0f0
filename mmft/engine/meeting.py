"""How the processes of a run find each other: torch's own meeting (MASTER_ADDR, MASTER_PORT), kept to its time.

torch's client of a store looks for its host for the whole timeout, pauses for a random time that has grown with it, and
looks for the whole timeout again (21 to 42 s were measured with one of 20 s); a host that takes the connection and says
nothing is waited for without end. So a thread looks, and the process waits for it no longer than `train.ddp_timeout`.
Once they have met, a closed connection tells of a death at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

from torch.distributed import DistError, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from mmft.errors import MmftError

MEETING = "mmft://"
"""`init_method` of torch's process groups that meet as it is told here."""

Met = tuple[Store, int, int]
"""The store, this process's rank, how many there are."""


def meet(url: str, *, timeout: timedelta, **how: Any) -> Iterator[Met]:
    """torch's handler of `env://`; MmftError where not all are there within `timeout`."""
    asked = parse_qs(urlparse(url).query)
    rank, world = (asked[name][0] if name in asked else os.environ[name.upper()] for name in ("rank", "world_size"))
    found: list[Met] = []
    failed: list[Exception] = []

    def look() -> None:
        try:
            found.append(next(rendezvous("env" + url.removeprefix("mmft"), timeout=timeout, **how)))
        except Exception as error:
            failed.append(error)

    if rank == "0":  # the host keeps to its time; where a launcher is the host, it also ends whom it started
        look()
    else:
        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        looking.join(timeout.total_seconds())
    if failed and not isinstance(failed[0], DistError):
        raise failed[0]
    if not found:
        raise MmftError(
            f"process {rank} of {world} did not meet the others in {timeout.total_seconds():.0f} s",
            where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} (MASTER_ADDR, MASTER_PORT)",
            do="look why one of them ended or never started; raise train.ddp_timeout where it takes longer",
        ) from (failed[0] if failed else None)
    yield found[0]


register_rendezvous_handler(urlparse(MEETING).scheme, meet)
