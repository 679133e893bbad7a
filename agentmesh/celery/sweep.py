"""The tender: one OS thread a worker process that renews its leases and sweeps, whatever its event loop is doing."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from agentmesh.engine import Engine
from agentmesh.errors import MeshError
from agentmesh.journal import Journal

EMPTY_S = 1.0
log = logging.getLogger("agentmesh")


class Tender(threading.Thread):
    """Renews every lease of this process in one command, and takes its turn at sweeping.

    Args:
        journal: the thread's own, with a connection of its own: a busy event loop must not cost a lease.
        lengths: how many messages wait in each broker queue; a queue that was empty for a second is told to the sweep.
    """

    def __init__(
        self, *, engines: Sequence[Engine], journal: Journal, worker: str, queues: Sequence[str],
        lengths: Callable[[Sequence[str]], dict[str, int]], ttl_s: float, sweep_s: float,
    ) -> None:  # fmt: skip
        super().__init__(name="agentmesh-tender", daemon=True)
        self._engines, self._journal, self._worker = engines, journal, worker
        self._queues, self._lengths = list(queues), lengths
        self._ttl_s, self._sweep_s = ttl_s, sweep_s
        self._empty_since: dict[str, float] = {}
        self._looking: asyncio.Task[dict[str, int]] | None = None
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
        await self._journal.close()

    async def _renew(self) -> None:
        for engine in self._engines:
            leases = engine.held()
            if leases:
                for unit in await self._journal.renew(self._worker, leases):
                    engine.lose(unit)

    def _empty(self, now: float) -> list[str]:
        """The queues that had nothing in them at every look for a second; a broker that does not answer costs no lease."""
        if self._looking is not None and not self._looking.done():
            self._empty_since.clear()  # since when is not known any more
            return []
        looked, self._looking = self._looking, asyncio.ensure_future(asyncio.to_thread(self._lengths, self._queues))
        for queue, length in (looked.result() if looked else {}).items():
            if length:
                self._empty_since.pop(queue, None)
            else:
                self._empty_since.setdefault(queue, now)
        return [q for q, since in self._empty_since.items() if now - since >= EMPTY_S]
