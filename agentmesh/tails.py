"""The tails of recent runs that a worker keeps, so that a claim asks the journal only for what is new."""

from collections import OrderedDict
from dataclasses import dataclass

from agentmesh.replay import History, Waiting

CACHED_RUNS, CACHED_EVENTS = 4096, 30_000


@dataclass(slots=True)
class Cached:
    """The tail of a recent run: its history, the last thing its flow waited for, and the journal's epoch it was read in."""

    history: History
    waiting: Waiting | None = None
    epoch: int = 0
    counted: int = 0


class Tails:
    """The runs that were worked on last, by id; bounded in runs and in events, the oldest leave first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Cached] = OrderedDict()
        self._events = 0

    def get(self, run_id: str, epoch: int) -> Cached | None:
        """One that was read in an earlier epoch is none: the store may have come back without what it says."""
        cached = self._kept.get(run_id)
        if cached is not None and cached.epoch != epoch:
            self.drop(run_id)
            return None
        return cached

    def keep(self, run_id: str, cached: Cached) -> None:
        """This is the newest now."""
        self.drop(run_id)
        self._kept[run_id] = cached
        cached.counted = cached.history.version
        self._events += cached.counted
        while len(self._kept) > CACHED_RUNS or (self._events > CACHED_EVENTS and len(self._kept) > 1):
            self.drop(next(iter(self._kept)))

    def drop(self, run_id: str) -> None:
        """Know it no more."""
        cached = self._kept.pop(run_id, None)
        if cached is not None:
            self._events -= cached.counted
