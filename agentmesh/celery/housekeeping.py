"""Housekeeping: one OS thread per worker process renews its leases and sweeps, even while its event loop is busy."""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from agentmesh.celery.event_loop import NativeThread
from agentmesh.engine.engine import Engine
from agentmesh.errors import MeshError
from agentmesh.journal.journal import Journal

EMPTY_AFTER_S = 1.0  # a queue without messages for so long is reported to the sweep
SWEEPER_S = 3.0  # how long the journal keeps one sweeper; SWEEPER_MS in lua/common.lua
IDLE_FACTOR = 2  # with nothing to do the time between two sweeps is so many times as long
log = logging.getLogger("agentmesh")


class QueueLengthReader(Protocol):
    """How many messages wait in each broker queue."""

    def __call__(self, queues: Sequence[str]) -> dict[str, int]:
        """{} when the broker does not respond."""
        ...

    def close(self) -> None:
        """Close its connection."""
        ...


class Housekeeper:
    """Renews all leases of this process in one command, and sweeps when it is the one sweeper of the journal.

    Args:
        journal: the thread's own, with a connection of its own: a busy event loop must not cost a lease.
        lengths: how many messages wait in each broker queue; a queue that was empty for a second is reported to the sweep.
            None where the journal's own server is the broker: the sweep then looks itself.
        sweep_s: infinite in a pool's child, whose parent sweeps.
    """

    renew_most_s = math.inf  # at most so long between two renewals, which tell a worker of cancelled runs

    def __init__(
        self, *, engines: Sequence[Engine], journal: Journal, worker: str, queues: Sequence[str],
        lengths: QueueLengthReader | None, ttl_s: float, sweep_s: float,
    ) -> None:  # fmt: skip
        self._engines, self._journal, self._worker = engines, journal, worker
        self._queues, self._lengths = list(queues), lengths
        self._ttl_s, self._sweep_s = ttl_s, sweep_s
        self._empty_since: dict[str, float] = {}
        self._dead: deque[str] = deque()
        self._stopped = self._idle = self._sweep_now = False
        self._wake: Callable[[], None] = lambda: None
        self._thread = NativeThread(lambda: asyncio.run(self._run()), "agentmesh-housekeeping")

    def start(self) -> None:
        """Start the thread; it runs until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; leases that are left expire, or the supervisor releases them."""
        self._stopped = True
        self._wake()
        self._thread.join(2)

    def release_dead(self, worker: str) -> None:
        """Release the leases of a dead process, whose name is `worker`, from the thread; returns at once."""
        self._dead.append(worker)
        self._wake()

    def wake(self) -> None:
        """There is work: sweep more often after an idle time. Thread-safe, and without cost while there is work."""
        if self._idle:
            self._idle, self._sweep_now = False, True
            self._wake()

    async def _run(self) -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: _wake_from_thread(loop, woken)
        renew_at, sweep_at = 0.0, 0.0 if self._sweep_s < math.inf else math.inf
        while not self._stopped:
            now = time.monotonic()
            try:
                await self._release_dead()
                if now >= renew_at:
                    await self._renew()
                    renew_at = now + min(self._ttl_s * 0.3, self.renew_most_s)
                if self._sweep_now:
                    self._sweep_now, sweep_at = False, min(sweep_at, now + self._sweep_s)
                if now >= sweep_at:
                    sweep_at = now + await self._sweep(now)
            except (OSError, MeshError) as e:
                log.warning("the journal does not respond (%s); retrying", e)
                await asyncio.sleep(0.2)
            except Exception:  # any error: a worker without this thread loses its leases
                log.exception("housekeeping failed; retrying")
                await asyncio.sleep(0.2)
            timer = loop.call_later(max(0.0, min(renew_at, sweep_at) - time.monotonic()), woken.set)
            await woken.wait()
            timer.cancel()
            woken.clear()
        with contextlib.suppress(OSError, MeshError):
            await self._release_dead()
        if self._lengths is not None:
            self._lengths.close()
        await self._journal.close()

    async def _sweep(self, now: float) -> float:
        """Sweep if this process is the sweeper; in how many seconds to try the next time."""
        if self._lengths is None:
            swept = await self._journal.sweep(self._worker, look=True)
        else:
            swept = await self._journal.sweep(self._worker, empty=self._empty(now, self._lengths))
        rest_s = swept.rest_ms / 1000
        if not swept.mine:  # in time to take over when the sweeper has died
            return max(self._sweep_s, min(rest_s, SWEEPER_S))
        self._idle = rest_s > self._sweep_s
        return max(self._sweep_s, min(rest_s, IDLE_FACTOR * self._sweep_s))

    async def _release_dead(self) -> None:
        while self._dead:
            await self._journal.release(self._dead[0], crashed=True)
            self._dead.popleft()

    async def _renew(self) -> None:
        for engine in self._engines:
            leases = engine.held_leases()
            if leases:
                for unit in await self._journal.renew(self._worker, leases):
                    engine.lose_lease(unit)

    def _empty(self, now: float, read_lengths: QueueLengthReader) -> list[str]:
        """The queues that were empty at every look for a second."""
        lengths = read_lengths(self._queues)
        if not lengths:
            self._empty_since.clear()  # the broker does not respond: nothing is known of its queues
        for queue, length in lengths.items():
            if length:
                self._empty_since.pop(queue, None)
            else:
                self._empty_since.setdefault(queue, now)
        return [q for q, since in self._empty_since.items() if now - since >= EMPTY_AFTER_S]


def _wake_from_thread(loop: asyncio.AbstractEventLoop, woken: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the thread and its loop have ended
        loop.call_soon_threadsafe(woken.set)
