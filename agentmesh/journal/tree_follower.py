"""Follows the events of a run's whole tree: each call is one exchange with the store for each level of the tree."""

from collections.abc import AsyncIterator

from agentmesh.journal.events import ENDS, Event, RunStarted, StepDone, StepFailed, StepPlanned
from agentmesh.journal.journal import Journal


class TreeFollower:
    """Reads the events of a run and of every run below it. The runs below are found in the events.

    Attributes:
        ended: the run itself has ended.
    """

    def __init__(self, journal: Journal, run_id: str) -> None:
        self._journal, self._run_id = journal, run_id
        self._versions = {run_id: 0}  # events read of each run that has not ended
        self.ended = False

    @property
    def version(self) -> int:
        """How many events of the run itself were read; 0 after its end."""
        return self._versions.get(self._run_id, 0)

    async def new_events(self) -> AsyncIterator[tuple[str, Event]]:
        """Each event added since the last call, with its run: those of a run in order, and after those of its parent."""
        unread, unbegun = dict(self._versions), set[str]()
        while unread:
            below: dict[str, int] = {}
            async for run, events in self._journal.new_events(unread):
                if isinstance(events[0], RunStarted):
                    self._versions[run] = 0  # a new run, or one begun anew
                for event in events:
                    self._follow(run, event, below, unbegun)
                    yield run, event
            unread = below
        for run in unbegun:  # a step that failed before its child run began
            if self._versions.get(run) == 0:
                del self._versions[run]

    def _follow(self, run: str, event: Event, below: dict[str, int], unbegun: set[str]) -> None:
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
    """All events of a run's tree so far, each with its run: the run itself first, then by depth."""
    events: dict[str, list[tuple[str, Event]]] = {}
    async for run, event in TreeFollower(journal, run_id).new_events():
        events.setdefault(run, []).append((run, event))
    return [item for run_events in events.values() for item in run_events]
