"""The events of a run's whole tree as they are written, in one exchange with the store for all its runs."""

from collections.abc import AsyncIterator

from agentmesh.journal.events import ENDS, Event, RunStarted, StepDone, StepFailed, StepPlanned
from agentmesh.journal.journal import Journal


class TreeFollower:
    """Reads the events of a run and of every run below it. A run's sub-agents are known from its own events.

    Attributes:
        ended: the run itself has ended.
    """

    def __init__(self, journal: Journal, run_id: str) -> None:
        self._journal, self._run_id = journal, run_id
        self._versions = {run_id: 0}  # how much was read of each run that has not ended
        self.ended = False

    @property
    def version(self) -> int:
        """How many events of the run itself were read; of one that has ended 0."""
        return self._versions.get(self._run_id, 0)

    async def new_events(self) -> AsyncIterator[tuple[str, Event]]:
        """Each event that was added since the last call, with its run; a run's own come in order, its parent's before."""
        ask, unbegun = dict(self._versions), set[str]()
        while ask:
            below: dict[str, int] = {}
            async for run, events in self._journal.new_events(ask):
                if isinstance(events[0], RunStarted):
                    self._versions[run] = 0  # new to us, or begun anew
                for event in events:
                    self._take_in(run, event, below, unbegun)
                    yield run, event
            ask = below
        for run in unbegun:  # a step that failed before its run began has none
            if self._versions.get(run) == 0:
                del self._versions[run]

    def _take_in(self, run: str, event: Event, below: dict[str, int], unbegun: set[str]) -> None:
        if run in self._versions:
            self._versions[run] += 1
        if isinstance(event, StepPlanned) and event.lane == "child":
            child = f"{run}/{event.n}"
            if child not in self._versions:
                self._versions[child] = below[child] = 0
        elif isinstance(event, StepDone | StepFailed):
            unbegun.add(f"{run}/{event.n}")
        elif isinstance(event, ENDS):
            self._versions.pop(run, None)
            self.ended = self.ended or run == self._run_id


async def tree_events(journal: Journal, run_id: str) -> list[tuple[str, Event]]:
    """All events of a run's tree so far, each with its run: the run's own first, then by depth."""
    events: dict[str, list[tuple[str, Event]]] = {}
    async for run, event in TreeFollower(journal, run_id).new_events():
        events.setdefault(run, []).append((run, event))
    return [item for run_events in events.values() for item in run_events]
