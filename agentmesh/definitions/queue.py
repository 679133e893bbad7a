"""Where steps wait for workers: a plain queue, one whose workers load a model, and one in front of model servers."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from agentmesh.address import is_server_url
from agentmesh.errors import DefinitionError

RATE = re.compile(r"([1-9][0-9]{0,8})/([smh])")
QUEUE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
POOLS: tuple[Literal["asyncio", "prefork"], ...] = ("asyncio", "prefork")
LANES = ("realtime", "high", "low")
EMBED_QUEUE = "embed"  # the queue that the embed steps of an ingest name
Pool = Literal["asyncio", "prefork"]
Lane = Literal["realtime", "high", "low"]
WorkerKind = Literal["asyncio", "prefork", "device"]
Suspects = Literal["include", "exclude", "only"]  # what a worker does about the suspects of its queues
UNAVAILABLE_TIMEOUT_S = 600.0  # a model server that restarts loads its model first
UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000}
# The parameters that were renamed; what a program still writes is answered with the new word.
RENAMED = {"url": "urls", "away_s": "unavailable_timeout_s", "gpu_memory": "gpu_memory_fraction"}
NOUNS: dict[Any, tuple[str, Any]] = {str: ("text", str), int: ("a whole number", int), float: ("a number", float | int)}
EXAMPLES = {"model": "NAME", "urls": ["http://HOST:8000/v1"]}  # for a required parameter that a call leaves out


@dataclass(frozen=True, slots=True)
class Servers:
    """OpenAI-compatible servers that answer the model calls of a queue.

    Args:
        urls: their base URLs.
        key_env: the environment variable that holds their key; "" sends none.
        unavailable_timeout_s: how long a step waits while none of them responds.
    """

    urls: tuple[str, ...]
    key_env: str = ""
    # lanes in front of the same servers may differ in it
    unavailable_timeout_s: float = field(default=UNAVAILABLE_TIMEOUT_S, compare=False)


@dataclass(frozen=True)
class BaseQueue:
    """What every queue has; a program writes `Queue`, `DeviceQueue` or `ServerQueue`."""

    name: str
    _: KW_ONLY
    concurrency: int = 0
    rate: str = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse a parameter of another class of queue, or a missing one, with the line to write instead."""
        if args or kwargs:  # neither where a queue is copied or unpickled
            options = dict(kwargs)
            name = args[0] if args else options.pop("name", "NAME")
            unknown, missing = sorted(set(options) - set(_parameters(cls))), _missing(cls, options)
            if unknown:
                raise DefinitionError(
                    f"queue {name!r}: {cls.__name__} has no parameter `{unknown[0]}`",
                    hint=_line_to_write(name, options),
                )
            if missing:
                raise DefinitionError(
                    f"queue {name!r}: {cls.__name__} needs `{next(iter(missing))}`",
                    hint=f"write {_call(cls, name, missing | options)}",
                )
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for f in fields(self):
            noun, types = NOUNS.get(f.type, ("", object))
            if not isinstance(value := getattr(self, f.name), types):
                raise DefinitionError(f"{self._label}: {f.name}={value!r} is not {noun}", hint=f"write {noun}")
        if not QUEUE_NAME.fullmatch(self.name):
            raise DefinitionError(
                f"{self._label} must be letters, digits, `_`, `-`, at most 64", hint="use one such as 'web'"
            )
        if self.concurrency < 0:
            raise DefinitionError(
                f"{self._label}: concurrency={self.concurrency} is negative", hint="write 0 for the default"
            )
        self._check()
        if self.concurrency == 0:
            object.__setattr__(self, "concurrency", self._default_concurrency())
        self.rate_limit()

    def _check(self) -> None:
        """Check the parameters that only this class of queue has."""

    def _default_concurrency(self) -> int:
        return 100

    @property
    def _label(self) -> str:
        return f"queue {self.name!r}"

    @property
    def worker_kind(self) -> WorkerKind:
        """The kind of worker process that serves it."""
        return "asyncio"

    @property
    def isolates_suspects(self) -> bool:
        """Whether its suspects run in a process of their own."""
        return True

    def serves_model(self, model: str) -> bool:
        """Whether steps on this model, `provider:name`, go here."""
        return False

    def rate_limit(self) -> tuple[int, int] | None:
        """Milliseconds between two steps, and how many may start at once; None without a rate."""
        if not self.rate:
            return None
        written = RATE.fullmatch(self.rate)
        if written is None:
            raise DefinitionError(
                f"{self._label}: rate={self.rate!r} is not a number per `s`, `m` or `h`", hint="write it like '100/m'"
            )
        amount, unit = int(written[1]), written[2]
        gap_ms = max(1, UNITS_MS[unit] // amount)
        return gap_ms, max(1, min(amount, 1000 // gap_ms))


@dataclass(frozen=True)
class Queue(BaseQueue):
    """Steps of any kind, for workers that wait or compute.

    Args:
        concurrency: steps at once in one worker: coroutines (0 is 100), or processes of a prefork pool (0 is one a core).
        rate: cluster-wide ceiling of steps, such as `100/m`, `5/s`, `1000/h`; "" is none.
        model: steps on this model, `provider:name`, go here, such as to share its `rate`; "" leaves that to agents that name
            the queue. A local model takes a `DeviceQueue`.
        pool: "asyncio" for steps that wait; "prefork" for `def` tools that compute: a process each, killed when it does
            not stop at its timeout.
    """

    _: KW_ONLY
    model: str = ""
    pool: Pool = "asyncio"

    def _check(self) -> None:
        if not _may_have_model(Queue, self.model):
            raise DefinitionError(
                f"{self._label}: {self.model!r} is a local model, which the workers of a Queue do not load",
                hint=f"write {_call(DeviceQueue, self.name, {'model': self.model.removeprefix('local:')})}",
            )
        if self.pool not in POOLS:
            raise DefinitionError(f"{self._label}: unknown pool {self.pool!r}", hint=f"use one of: {', '.join(POOLS)}")

    def _default_concurrency(self) -> int:
        return 100 if self.pool == "asyncio" else os.cpu_count() or 1

    @property
    def worker_kind(self) -> WorkerKind:
        """Its pool."""
        return self.pool

    def serves_model(self, model: str) -> bool:
        """Whether steps on this model, `provider:name`, go here."""
        return bool(self.model) and model == self.model


@dataclass(frozen=True)
class DeviceQueue(BaseQueue):
    """Steps on a model that this queue's workers load themselves: one process for each GPU, or one on the CPU.

    Queues of one model are served by the same processes; `lane` says which of them comes first. There is no `pool`: a
    forked process cannot use the device that its parent opened, and each would load the weights again.

    Args:
        model: the local model, with or without `local:`; steps on it go here.
        concurrency: steps at once in one process, at most, if the engine has room for them; 0 is 256. The largest of the
            queues of one model counts.
        rate: as in `Queue`.
        devices: GPU numbers, one worker process each; "all" is every one, or one process on the CPU.
        gpu_memory_fraction: the part of a GPU's free memory that prompts and answers may take, in (0, 1].
        max_batch_tokens: new tokens of one step of the engine; 0 is 2,048, on a CPU 256.
        lane: "realtime" comes first and has places reserved for it, "low" comes after "high".
        embed: a `local:` encoder that the same processes run beside the model, for the embed steps of ingests: of those
            that `agentmesh rag add` begins, and of an `Ingest()` in this crew, where it has no queue named `embed`.
    """

    _: KW_ONLY
    model: str
    devices: Literal["all"] | Sequence[int] = "all"
    gpu_memory_fraction: float = 0.85
    max_batch_tokens: int = 0
    lane: Lane = "high"
    embed: str = ""

    def _check(self) -> None:
        object.__setattr__(self, "model", self.model.removeprefix("local:"))
        if not self.model:
            raise DefinitionError(f"{self._label}: model is empty", hint="name one, such as 'Qwen/Qwen3-8B'")
        if not _may_have_model(DeviceQueue, self.model):
            raise DefinitionError(
                f"{self._label}: {self.model!r} is not a local model, which the workers of a DeviceQueue load",
                hint=f"write {_call(Queue, self.name, {'model': self.model})}",
            )
        if isinstance(self.devices, Iterable) and not isinstance(self.devices, str):
            object.__setattr__(self, "devices", tuple(self.devices))
        is_valid = self.devices == "all" or (
            isinstance(self.devices, tuple) and self.devices and all(type(d) is int and d >= 0 for d in self.devices)
            and len(set(self.devices)) == len(self.devices)
        )  # fmt: skip
        if not is_valid:
            raise DefinitionError(
                f"{self._label}: devices={self.devices!r} is not a list of different GPU numbers",
                hint="write them like [0, 1], or 'all'",
            )
        if not 0 < self.gpu_memory_fraction <= 1:
            raise DefinitionError(
                f"{self._label}: gpu_memory_fraction={self.gpu_memory_fraction} is not in (0, 1]",
                hint="write a part of the whole, such as 0.85",
            )
        if self.max_batch_tokens < 0:
            raise DefinitionError(
                f"{self._label}: max_batch_tokens={self.max_batch_tokens} is negative", hint="write 0 for the default"
            )
        _check_lane(self._label, self.lane)
        provider, _, encoder = self.embed.partition(":")
        if self.embed and (provider != "local" or not encoder):
            raise DefinitionError(
                f"{self._label}: embed={self.embed!r} is not an encoder of this machine",
                hint="write it like 'local:intfloat/e5-small-v2'",
            )

    def _default_concurrency(self) -> int:
        return 256

    @property
    def worker_kind(self) -> WorkerKind:
        """A process of its own for each device."""
        return "device"

    @property
    def isolates_suspects(self) -> bool:
        """No: a process of their own would load the model once more."""
        return False

    def serves_model(self, model: str) -> bool:
        """Whether steps on this model, `provider:name`, go here."""
        return model == f"local:{self.model}"


@dataclass(frozen=True)
class ServerQueue(BaseQueue):
    """Steps whose model calls OpenAI-compatible servers answer (vLLM, SGLang, llama-server).

    Queues of one model in front of the same servers share their places; `lane` says which of them comes first.

    Args:
        urls: base URLs of the servers.
        model: steps on this model, or on `local:MODEL`, go here; "" leaves that to agents that name the queue.
        concurrency: model calls in flight in one worker, at all servers together; 0 is 100. The largest of the queues that
            share their places counts.
        rate: as in `Queue`.
        key_env: the environment variable that holds the servers' key; "" sends none.
        unavailable_timeout_s: while no server responds, steps wait this long before they fail; the wait is not counted
            against `retries`. With 0 only `retries` count.
        lane: "realtime" comes first and has places reserved for it, "low" comes after "high".
    """

    _: KW_ONLY
    urls: str | Sequence[str]
    model: str = ""
    key_env: str = ""
    unavailable_timeout_s: float = UNAVAILABLE_TIMEOUT_S
    lane: Lane = "high"

    def _check(self) -> None:
        urls = list(self.urls) if isinstance(self.urls, Iterable) and not isinstance(self.urls, str) else [self.urls]
        for url in urls or [""]:
            if not is_server_url(url):
                raise DefinitionError(
                    f"{self._label}: {url!r} in urls is not the URL of a server",
                    hint="write it like 'http://gpu1:8000/v1'",
                )
        object.__setattr__(self, "urls", tuple(dict.fromkeys(map(_with_api_path, urls))))
        if not self.unavailable_timeout_s >= 0:  # NaN too
            raise DefinitionError(
                f"{self._label}: unavailable_timeout_s={self.unavailable_timeout_s} is not a time",
                hint="write seconds, 0 or more",
            )
        _check_lane(self._label, self.lane)

    @property
    def servers(self) -> Servers:
        """The servers that answer this queue's model calls."""
        return Servers(tuple(self.urls), self.key_env, self.unavailable_timeout_s)

    @property
    def shared_places(self) -> tuple[frozenset[str], str]:
        """Equal for queues that share their places in a worker."""
        return frozenset(self.urls), self.model

    def serves_model(self, model: str) -> bool:
        """Whether steps on this model, `provider:name`, go here."""
        return bool(self.model) and model in (self.model, f"local:{self.model}")


def _check_lane(label: str, lane: str) -> None:
    if lane not in LANES:
        raise DefinitionError(f"{label}: unknown lane {lane!r}", hint=f"use one of: {', '.join(LANES)}")


def _parameters(cls: type[BaseQueue]) -> list[str]:
    return [f.name for f in fields(cls)]


def _missing(cls: type[BaseQueue], options: dict[str, Any]) -> dict[str, Any]:
    """The required parameters that are left out, each with an example."""
    required = [f.name for f in fields(cls) if f.default is MISSING and f.name != "name"]
    return {word: EXAMPLES[word] for word in required if word not in options}


def _is_local(model: str) -> bool:
    return ":" not in model.removeprefix("local:")


def _may_have_model(cls: type[BaseQueue], model: str | None) -> bool:
    return not model or cls is ServerQueue or _is_local(model) == (cls is DeviceQueue)


def _call(cls: type[BaseQueue], name: str, arguments: dict[str, Any]) -> str:
    return f"{cls.__name__}({name!r}, {', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def _line_to_write(name: str, kwargs: dict[str, Any]) -> str:
    """The first class of queue that has all these parameters, called with them; else what each class has."""
    classes: tuple[type[BaseQueue], ...] = (Queue, DeviceQueue, ServerQueue)
    words = {RENAMED.get(word, word): value for word, value in kwargs.items()}
    without_pool = {word: value for word, value in words.items() if word != "pool"}
    for arguments, verb in ((words, "write"), (without_pool, "leave out `pool`, which only Queue has:")):
        for cls in classes:
            if set(arguments) <= set(_parameters(cls)) and _may_have_model(cls, arguments.get("model")):
                return f"{verb} {_call(cls, name, _missing(cls, arguments) | arguments)}"
    return "use one of: " + " · ".join(f"{cls.__name__}({', '.join(_parameters(cls))})" for cls in classes)


def _with_api_path(url: str) -> str:
    """`http://gpu1:8000` is `http://gpu1:8000/v1`."""
    base = url.rstrip("/")
    return base if urlsplit(base).path else f"{base}/v1"
