"""Histories of recent runs, cached so that a claim reads only new events from the journal."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agentmesh.engine.replay import History, Waiting

CACHED_RUNS, CACHED_EVENTS = 4096, 30_000
WRITE_WAIT_S = 0.2  # how long a claim waits for this process's own write of the run; then it reads the run anew


@dataclass(slots=True)
class CachedHistory:
    """The tail of a recent run: its history, the last thing its flow waited for, and the journal's epoch it was read in."""

    history: History
    waiting: Waiting | None = None
    epoch: int = 0
    event_count: int = 0


class HistoryCache:
    """The runs that were worked on last, by id; bounded in runs and in events, the oldest leave first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, CachedHistory] = OrderedDict()
        self._events = 0
        self._writing: dict[str, asyncio.Future[None]] = {}

    def get(self, run_id: str, epoch: int) -> CachedHistory | None:
        """One that was read in an earlier epoch is none: the store may have come back without what it says."""
        cached = self._kept.get(run_id)
        if cached is not None and cached.epoch != epoch:
            self.drop(run_id)
            return None
        return cached

    def keep(self, run_id: str, cached: CachedHistory) -> None:
        """This is the newest now."""
        self.drop(run_id)
        self._kept[run_id] = cached
        cached.event_count = cached.history.version
        self._events += cached.event_count
        while len(self._kept) > CACHED_RUNS or (self._events > CACHED_EVENTS and len(self._kept) > 1):
            self.drop(next(iter(self._kept)))

    def drop(self, run_id: str) -> None:
        """Forget the run."""
        cached = self._kept.pop(run_id, None)
        if cached is not None:
            self._events -= cached.event_count

    @contextmanager
    def writing(self, run_id: str) -> Iterator[None]:
        """While this process writes a run's events: what it knows of the run is between two versions, and no tail."""
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
        """Come back when no write is under way here.

        The script that writes pushes the next message itself, which is back here before the script's answer has been
        read: a claim that did not wait would fetch the whole run, at every step.
        """
        written = self._writing.get(run_id)
        if written is not None and written.get_loop() is asyncio.get_running_loop():
            await asyncio.wait((written,), timeout=WRITE_WAIT_S)
