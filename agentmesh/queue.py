"""A named Celery queue: how many steps at once, how fast, in what pool, on what device."""

import os
import re
from dataclasses import dataclass
from typing import Literal

from agentmesh.errors import DefinitionError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
POOLS = ("asyncio", "prefork")
Suspects = Literal["too", "elsewhere", "only"]  # what a worker does about the suspects of its queues
UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000}


@dataclass(frozen=True, slots=True)
class Queue:
    """Where steps wait for workers.

    Args:
        concurrency: steps at once in one worker: coroutines, or processes of a prefork pool; 0 is 100, or a process a core.
        rate: cluster-wide ceiling such as `100/m`, `5/s`, `1000/h`; "" is none.
        model: the local model this queue's workers load; steps on `local:MODEL` go here.
        pool: "asyncio" for what waits; "prefork" for `def` tools that compute: a process each, killed when it will not stop.
    """

    name: str
    concurrency: int = 0
    rate: str = ""
    model: str = ""
    pool: Literal["asyncio", "prefork"] = "asyncio"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise DefinitionError(f"queue name {self.name!r} must be letters, digits, `_`, `-`, at most 64")
        if self.pool not in POOLS:
            raise DefinitionError(f"queue {self.name!r}: pool={self.pool!r} must be 'asyncio' or 'prefork'")
        if self.concurrency < 0:
            raise DefinitionError(f"queue {self.name!r}: concurrency={self.concurrency} must not be negative")
        if self.concurrency == 0:
            object.__setattr__(self, "concurrency", 100 if self.pool == "asyncio" else os.cpu_count() or 1)
        self.pace()

    def pace(self) -> tuple[int, int] | None:
        """Milliseconds between two steps, and how many may go at once; None without a rate."""
        if not self.rate:
            return None
        amount, _, unit = self.rate.partition("/")
        if not amount.isdigit() or int(amount) < 1 or unit not in UNITS_MS:
            raise DefinitionError(f"queue {self.name!r}: rate={self.rate!r} must be like '5/s', '100/m' or '1000/h'")
        gap = max(1, UNITS_MS[unit] // int(amount))
        return gap, max(1, min(int(amount), 1000 // gap))
