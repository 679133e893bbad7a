"""The tender: one OS thread a worker process that renews its leases and sweeps, whatever its event loop is doing."""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from agentmesh.engine import Engine
from agentmesh.errors import MeshError
from agentmesh.journal import Journal

EMPTY_S = 1.0
log = logging.getLogger("agentmesh")


class Lengths(Protocol):
    """How many messages wait in each broker queue."""

    def __call__(self, queues: Sequence[str]) -> dict[str, int]:
        """Nothing when the broker is away."""
        ...

    def close(self) -> None:
        """Give back what it counts with."""
        ...


class Tender(threading.Thread):
    """Renews every lease of this process in one command, and takes its turn at sweeping.

    Args:
        journal: the thread's own, with a connection of its own: a busy event loop must not cost a lease.
        lengths: how many messages wait in each broker queue; a queue that was empty for a second is told to the sweep.
    """

    def __init__(
        self, *, engines: Sequence[Engine], journal: Journal, worker: str, queues: Sequence[str],
        lengths: Lengths, ttl_s: float, sweep_s: float,
    ) -> None:  # fmt: skip
        super().__init__(name="agentmesh-tender", daemon=True)
        self._engines, self._journal, self._worker = engines, journal, worker
        self._queues, self._lengths = list(queues), lengths
        self._ttl_s, self._sweep_s = ttl_s, sweep_s
        self._empty_since: dict[str, float] = {}
        self._over = threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        asyncio.run(self._tend())

    def stop(self) -> None:
        """End the thread; leases that are left run out, or are released by the supervisor."""
        self._over.set()
        if self.is_alive():
            self.join(timeout=2)

    async def _tend(self) -> None:
        renewed = swept = 0.0
        while not self._over.is_set():
            now = time.monotonic()
            try:
                if now - renewed >= self._ttl_s * 0.3:
                    await self._renew()
                    renewed = now
                if now - swept >= self._sweep_s:
                    await self._journal.sweep(self._worker, empty=self._empty(now))
                    swept = now
            except (OSError, MeshError) as e:
                log.warning("the journal does not answer (%s); trying again", e)
                await asyncio.sleep(0.2)
            await asyncio.to_thread(self._over.wait, min(self._sweep_s, self._ttl_s * 0.3))
        self._lengths.close()
        await self._journal.close()

    async def _renew(self) -> None:
        for engine in self._engines:
            leases = engine.held()
            if leases:
                for unit in await self._journal.renew(self._worker, leases):
                    engine.lose(unit)

    def _empty(self, now: float) -> list[str]:
        """The queues that had nothing in them at every look for a second."""
        lengths = self._lengths(self._queues)
        if not lengths:
            self._empty_since.clear()  # the broker is away: nothing is known, and nothing it could be sent
        for queue, length in lengths.items():
            if length:
                self._empty_since.pop(queue, None)
            else:
                self._empty_since.setdefault(queue, now)
        return [q for q, since in self._empty_since.items() if now - since >= EMPTY_S]
