"""A named Celery queue: how many steps at once, how fast, in what pool, on what device."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from agentmesh.errors import DefinitionError

QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
POOLS = ("asyncio", "prefork")
LANES = ("realtime", "high", "low")
EMBED_QUEUE = "embed"  # the queue that the embed steps of an ingest name
Suspects = Literal["include", "exclude", "only"]  # what a worker does about the suspects of its queues
SERVERS_WAIT_S = 600.0  # a model server that starts again loads its model first
UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000}


@dataclass(frozen=True, slots=True)
class Servers:
    """OpenAI-compatible servers that answer the model calls of a queue.

    Args:
        urls: their base URLs.
        key_env: the environment variable that holds their key; "" sends none.
        away_s: how long a step waits for them while none of them answers.
    """

    urls: tuple[str, ...]
    key_env: str = ""
    away_s: float = field(default=SERVERS_WAIT_S, compare=False)  # lanes in front of the same servers may differ in it


@dataclass(frozen=True, slots=True)
class Queue:
    """Where steps wait for workers.

    Args:
        concurrency: steps at once in one worker: coroutines, or processes of a prefork pool; 0 is 100, or a process a core;
            with a model 256, if the engine has room for them; with a url, in flight at its servers together. Queues of one
            model in front of the same servers share their places: the largest number that one of them has.
        rate: cluster-wide ceiling such as `100/m`, `5/s`, `1000/h`; "" is none.
        model: steps on this model go here: the name of a local one, which this queue's workers load; or `provider:name`
            of any other, which they ask.
        url: base URLs of OpenAI-compatible servers (vLLM, SGLang, llama-server), which then answer this queue's model calls.
        key_env: the environment variable that holds those servers' key; "" sends none.
        away_s: while none of those servers answers, for so long its steps wait for one before they fail; that is none of
            their `retries`. 0 has them fail after these.
        pool: "asyncio" for what waits; "prefork" for `def` tools that compute: a process each, killed when it will not stop.
        devices: with a model: one worker process for each of these GPUs; "all" is every one, or one process on the CPU.
        gpu_memory: with a model: the part of a GPU's free memory that prompts and answers may take, in (0, 1].
        max_batch_tokens: with a model: new tokens of one step of the engine; 0 is 2,048, on a CPU 256.
        lane: with a model or a url: "realtime" comes first and has places kept for it, "low" comes after "high"; between
            several queues of one model, or of one model in front of the same servers.
        embed: with a model: a `local:` encoder that the same processes run beside it, for the embed steps of ingests: of
            those that `agentmesh rag add` begins, and of an `Ingest()` in this crew, where it has no queue named `embed`.
    """

    name: str
    concurrency: int = 0
    rate: str = ""
    model: str = ""
    pool: Literal["asyncio", "prefork"] = "asyncio"
    devices: Literal["all"] | Sequence[int] = "all"
    gpu_memory: float = 0.85
    max_batch_tokens: int = 0
    lane: Literal["realtime", "high", "low"] = "high"
    url: str | Sequence[str] = ()
    key_env: str = ""
    away_s: float = SERVERS_WAIT_S
    embed: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", self.model.removeprefix("local:"))
        if not QUEUE_NAME.fullmatch(self.name):
            raise DefinitionError(f"queue name {self.name!r} must be letters, digits, `_`, `-`, at most 64")
        if self.pool not in POOLS:
            raise DefinitionError(f"queue {self.name!r}: pool={self.pool!r} must be 'asyncio' or 'prefork'")
        self._check_servers()
        if self.concurrency < 0:
            raise DefinitionError(f"queue {self.name!r}: concurrency={self.concurrency} must not be negative")
        self._check_device()
        self._check_embed()
        if self.concurrency == 0:
            usual = 256 if self.on_device else 100 if self.pool == "asyncio" else os.cpu_count() or 1
            object.__setattr__(self, "concurrency", usual)
        self.rate_limit()

    def _check_device(self) -> None:
        where = f"queue {self.name!r}"
        device_options = self.devices, self.gpu_memory, self.max_batch_tokens
        if not self.on_device and device_options != ("all", 0.85, 0):
            raise DefinitionError(
                f"{where}: devices, gpu_memory and max_batch_tokens are for a queue whose workers load a model",
                hint="add model='NAME', and leave out url",
            )
        if self.lane != "high" and not (self.on_device or self.url):
            raise DefinitionError(
                f"{where}: lane={self.lane!r} is between queues of one model",
                hint="add model='NAME', or url= of its servers",
            )
        if self.on_device and self.pool == "prefork":
            raise DefinitionError(
                f"{where}: a queue with a model is never prefork: a forked process cannot use the device that its parent "
                "opened, and each would load the weights again",
                hint="leave `pool` out",
            )
        if not isinstance(self.devices, str):
            object.__setattr__(self, "devices", tuple(self.devices))
        is_valid = self.devices == "all" or (
            self.devices and len(set(self.devices)) == len(self.devices)
            and all(isinstance(d, int) and d >= 0 for d in self.devices)
        )  # fmt: skip
        if not is_valid:
            raise DefinitionError(f"{where}: devices={self.devices!r} must be 'all' or GPU numbers, such as [0, 1]")
        if self.lane not in LANES:
            raise DefinitionError(f"{where}: lane={self.lane!r} must be one of {', '.join(LANES)}")
        if not 0 < self.gpu_memory <= 1:
            raise DefinitionError(f"{where}: gpu_memory={self.gpu_memory} must be a part of the whole, such as 0.85")
        if self.max_batch_tokens < 0:
            raise DefinitionError(f"{where}: max_batch_tokens={self.max_batch_tokens} must not be negative")

    def _check_embed(self) -> None:
        if not self.embed:
            return
        where = f"queue {self.name!r}: embed={self.embed!r}"
        if not self.on_device:
            raise DefinitionError(
                f"{where} is for a queue whose workers load a model: add model='NAME', and leave out url",
                hint="without a model, run `agentmesh worker agentmesh.rag.ingest --queue embed`",
            )
        provider, _, name = self.embed.partition(":")
        if provider != "local" or not name:
            raise DefinitionError(
                f"{where} must be an encoder of this machine, such as 'local:intfloat/e5-small-v2'",
                hint="others need no device",
            )

    def _check_servers(self) -> None:
        urls = [self.url] if isinstance(self.url, str) else list(self.url)
        for url in urls:
            parts = urlsplit(url) if isinstance(url, str) else None
            if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
                raise DefinitionError(
                    f"queue {self.name!r}: url has {url!r}", hint="write it like 'http://gpu1:8000/v1'"
                )
        if urls and self.pool != "asyncio":
            raise DefinitionError(
                f"queue {self.name!r}: url= is for waiting and pool='prefork' for computing", hint="leave out one"
            )
        if self.key_env and not urls:
            raise DefinitionError(
                f"queue {self.name!r}: key_env={self.key_env!r} is for the servers of url=", hint="name some"
            )
        if self.away_s < 0 or (self.away_s != SERVERS_WAIT_S and not urls):
            raise DefinitionError(
                f"queue {self.name!r}: away_s={self.away_s} must be seconds, 0 or more, that steps wait for the servers of url="
            )
        object.__setattr__(self, "url", tuple(dict.fromkeys(map(_with_api_path, urls))))

    @property
    def on_device(self) -> bool:
        """Whether its workers load its model themselves."""
        return bool(self.model and not self.url and ":" not in self.model)

    def serves_model(self, model: str) -> bool:
        """Whether steps on `provider:name` go here."""
        return bool(self.model) and model in (self.model, f"local:{self.model}")

    @property
    def servers(self) -> Servers | None:
        """Who answers this queue's model calls, where that is not its workers themselves."""
        return Servers(tuple(self.url), self.key_env, self.away_s) if self.url else None

    def rate_limit(self) -> tuple[int, int] | None:
        """Milliseconds between two steps, and how many may go at once; None without a rate."""
        if not self.rate:
            return None
        amount, _, unit = self.rate.partition("/")
        if not amount.isdigit() or int(amount) < 1 or unit not in UNITS_MS:
            raise DefinitionError(f"queue {self.name!r}: rate={self.rate!r} must be like '5/s', '100/m' or '1000/h'")
        gap = max(1, UNITS_MS[unit] // int(amount))
        return gap, max(1, min(int(amount), 1000 // gap))


def _with_api_path(url: str) -> str:
    """`http://gpu1:8000` is `http://gpu1:8000/v1`."""
    base = url.rstrip("/")
    return base if urlsplit(base).path else f"{base}/v1"
