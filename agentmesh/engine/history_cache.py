"""Histories of recent runs, cached so that a claim reads only new events from the journal."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agentmesh.engine.replay import History, Waiting
from agentmesh.sized_cache import MIB, SizedCache

HISTORY_CACHE_BYTES = 64 * MIB  # of events, as they are in memory: a small part of a container of 1 GB
RUN_BYTES = 4096  # what a run weighs beside its events: its flow's last steps, and the tables of its history
WRITE_WAIT_S = 0.2  # how long a claim waits for this process's own write of the run; then it reads the run anew


@dataclass(slots=True)
class CachedHistory:
    """A recent run: its history, the last thing its flow waited for, and the journal's epoch that it was read in."""

    history: History
    waiting: Waiting | None = None
    epoch: int = 0


class HistoryCache:
    """The runs that were worked on last, by id; bounded in bytes of events, the least recently used are evicted first.

    An evicted run costs a read of its journal at its next step, nothing else.

    Args:
        max_bytes: what the events of all runs may weigh together.
    """

    def __init__(self, max_bytes: int = HISTORY_CACHE_BYTES) -> None:
        self._runs: SizedCache[str, CachedHistory] = SizedCache("histories", max_bytes, _run_bytes)
        self._writing: dict[str, asyncio.Future[None]] = {}

    def get(self, run_id: str, epoch: int) -> CachedHistory | None:
        """The run, unless it was read in an earlier epoch: the store may have come back without a part of it."""
        cached = self._runs.get(run_id)
        if cached is not None and cached.epoch != epoch:
            self._runs.pop(run_id)
            return None
        return cached

    def keep(self, run_id: str, cached: CachedHistory) -> None:
        """Keep the run as the newest, weighed as it is now."""
        self._runs.put(run_id, cached)

    def drop(self, run_id: str) -> None:
        """Remove the run."""
        self._runs.pop(run_id)

    @contextmanager
    def writing(self, run_id: str) -> Iterator[None]:
        """While this process writes a run's events: its copy is between two versions, and not in the cache."""
        self.drop(run_id)
        written = self._writing[run_id] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            if self._writing.get(run_id) is written:
                del self._writing[run_id]
            if not written.done():
                written.set_result(None)

    async def wait_for_write(self, run_id: str) -> None:
        """Return when this process is not writing the run's events.

        The script that writes them pushes the next message itself, which arrives here before the script's answer has
        been read: a claim that did not wait would read the whole run, at every step.
        """
        written = self._writing.get(run_id)
        if written is not None and written.get_loop() is asyncio.get_running_loop():
            await asyncio.wait((written,), timeout=WRITE_WAIT_S)


def _run_bytes(run_id: str, cached: CachedHistory) -> int:
    return RUN_BYTES + cached.history.bytes
