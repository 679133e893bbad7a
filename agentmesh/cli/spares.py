"""Workers that a supervisor starts only when something waits for them: suspects, or steps that nobody else takes any more."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from agentmesh.boot import open_journal
from agentmesh.celery.seat import Command
from agentmesh.cli.child import spec_of
from agentmesh.cli.embedding import RAG, embed_queues
from agentmesh.config import Config
from agentmesh.crew import Crew
from agentmesh.errors import MeshError
from agentmesh.journal import Journal
from agentmesh.logs import Form
from agentmesh.queue import EMBED, POOLS

ANSWER_S = 2.0  # how long a look may take


class OnDemand:
    """A worker that is started when something waits in these broker queues; see seat.Spare."""

    def __init__(self, command: Command, queues: Sequence[str], journal: Callable[[], Journal]) -> None:
        self.command, self._queues, self._make = command, queues, journal
        self._journal: Journal | None = None
        self._loop = asyncio.Runner()  # of the thread that asks

    def wanted(self) -> bool:
        """Whether something waits."""
        with suppress(TimeoutError, OSError, MeshError):  # the store is away: nobody could work on one
            return self._loop.run(self._waiting()) > 0
        return False

    async def _waiting(self) -> int:
        if self._journal is None:
            self._journal = self._make()
        async with asyncio.timeout(ANSWER_S):
            return await self._journal.queued(self._queues)

    def close(self) -> None:
        """Give back the connection."""
        if self._journal is not None:
            self._loop.run(self._journal.close())
        self._loop.close()


def spares_of(
    config: Config, crews: Mapping[str, Crew], *, queues: Sequence[str] = (), concurrency: int = 0,
    log: Form | Literal[""] = "", events: bool = False,
) -> list[OnDemand]:  # fmt: skip
    """The workers for suspects, one a pool, beside those of `specs_of(…, suspects="elsewhere")`.

    Args:
        config: with its broker named.
    """
    spares = []
    for pool in POOLS:
        beside: list[str] = []
        for crew in crews.values():
            if served := crew.queues_in(pool, queues):
                beside += crew.broker_queues(served, suspects="only")
        if beside:
            command = spec_of(
                config, crews=list(crews), queues=list(queues), log=log, events=events, suspects="only", pool=pool,
                concurrency=1 if pool == "prefork" else concurrency,
            )  # fmt: skip
            spares.append(OnDemand(command, beside, lambda: open_journal(config)[1]))
    if embedded := embed_queues(crews.values(), queues, suspects="only"):
        command = spec_of(
            config, crews=[RAG], queues=[EMBED], log=log, events=events, suspects="only", concurrency=0,
            env={"CUDA_VISIBLE_DEVICES": ""},  # on the CPU: the device's memory is given out
        )  # fmt: skip
        spares.append(OnDemand(command, embedded, lambda: open_journal(config)[1]))
    return spares
