"""Workers that a supervisor starts only when something waits for them: suspects, or steps that nobody else takes any more."""

import asyncio
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from agentmesh.celery.app import make_app
from agentmesh.celery.broker import consumer_count
from agentmesh.config import Config
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import EMBED_QUEUE, POOLS
from agentmesh.errors import MeshError
from agentmesh.journal.journal import Journal
from agentmesh.observability.logs import Form
from agentmesh.runtime.bootstrap import open_journal
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.embed_queues import RAG, embed_queues
from agentmesh.worker.process import Command

REPLY_TIMEOUT_S = 2.0  # how long a look may take


class OnDemandWorker:
    """A worker that is started when something waits in these broker queues; see process.StandbyWorker."""

    def __init__(self, command: Command, queues: Sequence[str], journal: Callable[[], Journal]) -> None:
        self.command, self._queues, self._make = command, queues, journal
        self._journal: Journal | None = None
        self._loop = asyncio.Runner()  # of the thread that asks

    def is_needed(self) -> bool:
        """Whether something waits."""
        with suppress(TimeoutError, OSError, MeshError):  # the store is away: nobody could work on one
            return self._loop.run(self._waiting()) > 0
        return False

    async def _waiting(self) -> int:
        if self._journal is None:
            self._journal = self._make()
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            return await self._journal.queued(self._queues)

    def close(self) -> None:
        """Give back the connection."""
        if self._journal is not None:
            self._loop.run(self._journal.close())
        self._loop.close()


def standby_workers(
    config: Config, crews: Mapping[str, Crew], *, queues: Sequence[str] = (), concurrency: int = 0,
    log: Form | Literal[""] = "", events: bool = False,
) -> list[OnDemandWorker]:  # fmt: skip
    """The workers for suspects, one a pool, beside those of `specs_of(…, suspects="elsewhere")`.

    Args:
        config: with its broker named.
    """
    spares = []
    for pool in POOLS:
        suspect_queues: list[str] = []
        for crew in crews.values():
            if served := crew.queues.of_pool(pool, queues):
                suspect_queues += crew.queues.broker_names(served, suspects="only")
        if suspect_queues:
            command = worker_command(
                config, crews=list(crews), queues=list(queues), log=log, events=events, suspects="only", pool=pool,
                concurrency=1 if pool == "prefork" else concurrency,
            )  # fmt: skip
            spares.append(OnDemandWorker(command, suspect_queues, lambda: open_journal(config)[1]))
    if embedded := embed_queues(crews.values(), queues, suspects="only"):
        command = worker_command(
            config, crews=[RAG], queues=[EMBED_QUEUE], log=log, events=events, suspects="only", concurrency=0,
            env={"CUDA_VISIBLE_DEVICES": ""},  # on the CPU: the device's memory is given out
        )  # fmt: skip
        spares.append(OnDemandWorker(command, embedded, lambda: open_journal(config)[1]))
    return spares


# ---- Steps of a command's run that are left to workers elsewhere --------------------------------

WARN_AFTER_S, START_AFTER_S = 4.0, 10.0  # without a taker for so long


def queues_left_to_others(config: Config, path: str, crew: Crew, named: Sequence[str]) -> list[str]:
    """The queues whose steps workers elsewhere do: all but those named; of an ingest `embed`, where somebody takes from it.

    Args:
        named: the queues that the command's own workers shall serve; [] leaves it to us.
    """
    if named:
        return [queue for queue in crew.queues if queue not in named]
    if path != RAG or not consumer_count(make_app(config.broker), crew.queues.broker_name(EMBED_QUEUE)):
        return []
    everything = " ".join(f"--queue {queue}" for queue in crew.queues)
    _warn(f"embed steps run on the worker that serves them; to run them here too: {everything}")
    return [EMBED_QUEUE]


def fallback_workers(
    config: Config, path: str, crew: Crew, queues: Sequence[str], *, start: bool
) -> "list[FallbackWorker]":
    """For each of these queues, the worker for the case that nobody else serves it."""
    after_s = START_AFTER_S if start else math.inf
    return [FallbackWorker(config, path, crew, queue, start_s=after_s) for queue in queues]


class FallbackWorker(OnDemandWorker):
    """A worker for a queue that is left to workers elsewhere, when something waits there and they are gone.

    Args:
        start_s: without them for so long, it is started; infinite only says that steps wait.
    """

    def __init__(self, config: Config, path: str, crew: Crew, queue: str, *, start_s: float) -> None:
        # On the CPU: a device's worker may be on its way back, and has given out the device's memory.
        command: Command = worker_command(
            config, crews=[path], queues=[queue], concurrency=0, env={"CUDA_VISIBLE_DEVICES": ""},
            pool=crew.queues[queue].pool,
        )  # fmt: skip
        super().__init__(command, crew.queues.broker_names([queue]), lambda: open_journal(config)[1])
        self._app, self._path, self._queue, self._start_s = make_app(config.broker), path, queue, start_s
        self._since_s, self._said = math.inf, False

    def is_needed(self) -> bool:
        """Whether something waits, and nobody has taken from the queue for a while; says so."""
        now = time.monotonic()
        if not super().is_needed() or consumer_count(self._app, self._queues[0]) != 0:
            self._since_s, self._said = math.inf, False
            return False
        self._since_s = min(self._since_s, now)
        if now - self._since_s >= self._start_s:
            _warn(f"no worker serves queue {self._queue!r}; starting one here, on the CPU")
            return True
        if now - self._since_s >= WARN_AFTER_S and not self._said:
            self._said = True
            _warn(
                f"no worker takes {self._queue!r} steps ({self._queues[0]}); they wait for one: "
                f"agentmesh worker {self._path} --queue {self._queue}"
            )
        return False


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
