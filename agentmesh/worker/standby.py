"""Workers that a supervisor starts only when needed: for suspects, and for queues that no other worker serves any more."""

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

REPLY_TIMEOUT_S = 2.0  # of one check


class OnDemandWorker:
    """A worker that is started when something waits in these broker queues; a `process.StandbyWorker`."""

    def __init__(self, command: Command, queues: Sequence[str], journal: Callable[[], Journal]) -> None:
        self.command, self._queues, self._open_journal = command, queues, journal
        self._journal: Journal | None = None
        self._loop = asyncio.Runner()  # of the thread that calls `is_needed`

    def is_needed(self) -> bool:
        """Whether something waits in the queues."""
        with suppress(TimeoutError, OSError, MeshError):  # no worker could continue without the journal
            return self._loop.run(self._waiting()) > 0
        return False

    async def _waiting(self) -> int:
        if self._journal is None:
            self._journal = self._open_journal()
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            return await self._journal.queued(self._queues)

    def close(self) -> None:
        """Close the connection."""
        if self._journal is not None:
            self._loop.run(self._journal.close())
        self._loop.close()


def standby_workers(
    config: Config, crews: Mapping[str, Crew], *, queues: Sequence[str] = (), concurrency: int = 0,
    log: Form | Literal[""] = "", events: bool = False,
) -> list[OnDemandWorker]:  # fmt: skip
    """Workers for suspects, one a pool, beside those of `worker_commands(…, suspects="exclude")`.

    Args:
        config: with its broker set.
    """
    workers = []
    for pool in POOLS:
        suspect_queues: list[str] = []
        for crew in crews.values():
            if served := crew.queues.served_by(pool, queues):
                suspect_queues += crew.queues.broker_names(served, suspects="only")
        if suspect_queues:
            command = worker_command(
                config, crews=list(crews), queues=list(queues), log=log, events=events, suspects="only", pool=pool,
                concurrency=1 if pool == "prefork" else concurrency,
            )  # fmt: skip
            workers.append(OnDemandWorker(command, suspect_queues, lambda: open_journal(config)[1]))
    if suspect_queues := embed_queues(crews.values(), queues, suspects="only"):
        command = worker_command(
            config, crews=[RAG], queues=[EMBED_QUEUE], log=log, events=events, suspects="only", concurrency=0,
            env={"CUDA_VISIBLE_DEVICES": ""},  # on the CPU: the memory of the device is taken
        )  # fmt: skip
        workers.append(OnDemandWorker(command, suspect_queues, lambda: open_journal(config)[1]))
    return workers


# ---- Queues of a command's run that are left to workers elsewhere -------------------------------

WARN_AFTER_S, START_AFTER_S = 4.0, 10.0  # without a consumer for so long


def queues_left_to_others(config: Config, path: str, crew: Crew, selected: Sequence[str]) -> list[str]:
    """The queues that workers elsewhere serve: all but those selected; of an ingest `embed`, where somebody consumes it.

    Args:
        selected: the queues that the command's own workers serve; [] leaves the choice to this function.
    """
    if selected:
        return [queue for queue in crew.queues if queue not in selected]
    if path != RAG or not consumer_count(make_app(config.broker), crew.queues.broker_name(EMBED_QUEUE)):
        return []
    options = " ".join(f"--queue {queue}" for queue in crew.queues)
    _warn(f"embed steps run on the worker that serves them; to run them here too, add: {options}")
    return [EMBED_QUEUE]


def fallback_workers(
    config: Config, path: str, crew: Crew, queues: Sequence[str], *, start: bool
) -> "list[FallbackWorker]":
    """For each of these queues, a worker for the case that no other serves it."""
    start_after_s = START_AFTER_S if start else math.inf
    return [FallbackWorker(config, path, crew, queue, start_after_s=start_after_s) for queue in queues]


class FallbackWorker(OnDemandWorker):
    """A worker for a queue that is left to workers elsewhere, for the case that steps wait there and no worker consumes it.

    Args:
        start_after_s: it is started when there was no consumer for so long; infinite never starts it, and only warns.
    """

    def __init__(self, config: Config, path: str, crew: Crew, queue: str, *, start_after_s: float) -> None:
        # On the CPU: the device's worker may be restarting, and takes the memory of the device.
        command: Command = worker_command(
            config, crews=[path], queues=[queue], concurrency=0, env={"CUDA_VISIBLE_DEVICES": ""},
            pool=crew.queues[queue].worker_kind,
        )  # fmt: skip
        super().__init__(command, crew.queues.broker_names([queue]), lambda: open_journal(config)[1])
        self._app, self._path, self._queue, self._start_after_s = make_app(config.broker), path, queue, start_after_s
        self._since_s, self._warned = math.inf, False

    def is_needed(self) -> bool:
        """Whether something waits and no worker has consumed from the queue for a while; warns of it."""
        now = time.monotonic()
        if not super().is_needed() or consumer_count(self._app, self._queues[0]) != 0:
            self._since_s, self._warned = math.inf, False
            return False
        self._since_s = min(self._since_s, now)
        if now - self._since_s >= self._start_after_s:
            _warn(f"no worker serves queue {self._queue!r}; starting one here, on the CPU")
            return True
        if now - self._since_s >= WARN_AFTER_S and not self._warned:
            self._warned = True
            _warn(
                f"no worker takes {self._queue!r} steps ({self._queues[0]}); they wait for one: "
                f"agentmesh worker {self._path} --queue {self._queue}"
            )
        return False


def _warn(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
