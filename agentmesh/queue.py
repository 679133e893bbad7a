"""A named Celery queue: how many steps at once, how fast, in what pool, on what device."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from agentmesh.errors import DefinitionError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
POOLS = ("asyncio", "prefork")
Suspects = Literal["too", "elsewhere", "only"]  # what a worker does about the suspects of its queues
UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000}


@dataclass(frozen=True, slots=True)
class Servers:
    """OpenAI-compatible servers that answer the model calls of a queue.

    Args:
        urls: their base URLs.
        key_env: the environment variable that holds their key; "" sends none.
    """

    urls: tuple[str, ...]
    key_env: str = ""


@dataclass(frozen=True, slots=True)
class Queue:
    """Where steps wait for workers.

    Args:
        concurrency: steps at once in one worker: coroutines, or processes of a prefork pool; 0 is 100, or a process a core.
        rate: cluster-wide ceiling such as `100/m`, `5/s`, `1000/h`; "" is none.
        model: the local model this queue's workers load; steps on `local:MODEL` go here.
        url: base URLs of OpenAI-compatible servers (vLLM, SGLang, llama-server), which then answer this queue's model calls.
        key_env: the environment variable that holds those servers' key; "" sends none.
        pool: "asyncio" for what waits; "prefork" for `def` tools that compute: a process each, killed when it will not stop.
    """

    name: str
    concurrency: int = 0
    rate: str = ""
    model: str = ""
    pool: Literal["asyncio", "prefork"] = "asyncio"
    url: str | Sequence[str] = ()
    key_env: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise DefinitionError(f"queue name {self.name!r} must be letters, digits, `_`, `-`, at most 64")
        if self.pool not in POOLS:
            raise DefinitionError(f"queue {self.name!r}: pool={self.pool!r} must be 'asyncio' or 'prefork'")
        self._check_servers()
        if self.concurrency < 0:
            raise DefinitionError(f"queue {self.name!r}: concurrency={self.concurrency} must not be negative")
        if self.concurrency == 0:
            object.__setattr__(self, "concurrency", 100 if self.pool == "asyncio" else os.cpu_count() or 1)
        self.pace()

    def _check_servers(self) -> None:
        urls = [self.url] if isinstance(self.url, str) else list(self.url)
        for url in urls:
            parts = urlsplit(url) if isinstance(url, str) else None
            if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
                raise DefinitionError(f"queue {self.name!r}: url has {url!r}; write it like 'http://gpu1:8000/v1'")
        if urls and self.pool != "asyncio":
            raise DefinitionError(
                f"queue {self.name!r}: url= is for waiting and pool='prefork' for computing; leave out one"
            )
        if self.key_env and not urls:
            raise DefinitionError(
                f"queue {self.name!r}: key_env={self.key_env!r} is for the servers of url=; name some"
            )
        object.__setattr__(self, "url", tuple(dict.fromkeys(map(_with_path, urls))))

    @property
    def servers(self) -> Servers | None:
        """Who answers this queue's model calls, where that is not its workers themselves."""
        return Servers(tuple(self.url), self.key_env) if self.url else None

    def pace(self) -> tuple[int, int] | None:
        """Milliseconds between two steps, and how many may go at once; None without a rate."""
        if not self.rate:
            return None
        amount, _, unit = self.rate.partition("/")
        if not amount.isdigit() or int(amount) < 1 or unit not in UNITS_MS:
            raise DefinitionError(f"queue {self.name!r}: rate={self.rate!r} must be like '5/s', '100/m' or '1000/h'")
        gap = max(1, UNITS_MS[unit] // int(amount))
        return gap, max(1, min(int(amount), 1000 // gap))


def _with_path(url: str) -> str:
    """`http://gpu1:8000` is `http://gpu1:8000/v1`."""
    bare = url.rstrip("/")
    return bare if urlsplit(bare).path else f"{bare}/v1"
