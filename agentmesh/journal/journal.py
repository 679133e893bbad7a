"""The journal as the engine sees it: the events of runs, with entries, leases and timers."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentmesh.journal.events import Event
from agentmesh.journal.types import (
    Accepted,
    Claimed,
    JournalCounts,
    NewRun,
    NextSteps,
    OpenEntries,
    Refused,
    RetryImport,
    RunHead,
    Token,
)


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep did.

    Args:
        count: entries moved.
        rest_ms: for how long this worker need not sweep, if nothing new comes; 0: there is work.
        mine: it was this worker's turn.
    """

    count: int
    rest_ms: int = 0
    mine: bool = True


class Journal(Protocol):
    """The events of runs, with entries, leases and timers. The verbs are atomic and repeatable (docs/architecture.md)."""

    @property
    def epoch(self) -> int:
        """Changes when the store may have lost writes, as in a restart: what was read before is then void."""
        ...

    async def begin(self, new: NewRun, next: NextSteps, carried: Sequence[RetryImport] = ()) -> Accepted | Refused:
        """RunStarted and the first entries; again with the same spec is Accepted(is_repeat=True), with another Refused.

        Args:
            carried: of a retry, what it keeps of the run before it: first the run's own, then its sub-agents'.
        """
        ...

    async def claim(
        self, unit: str, *, worker: str, token: str, version: int, crew: str, crew_version: str,
        rate: tuple[int, int] | None = None, apart: bool = False,
    ) -> Claimed | Refused:  # fmt: skip
        """The entry under a new fence, and the events after `version`.

        Args:
            token: of this call; a repeated call with the same token gets the same answer.
            version: how many of the run's events the worker has.
            rate: (ms between two claims, burst) of the step's queue.
            apart: suspects have a worker process of their own, which is not this one: they are refused.
        """
        ...

    async def renew(self, worker: str, leases: Sequence[tuple[str, int]]) -> Sequence[str]:
        """Push the deadlines of leases (unit, fence); answers the units that the worker has lost."""
        ...

    async def release(self, worker: str, *, crashed: bool, queues: Sequence[str] = (), below: bool = False) -> int:
        """Give back all leases of a worker.

        Args:
            crashed: its process died, which counts against what it was working on.
            queues: where it may have taken messages that it did not claim; they are sent again.
            below: also those of its pool's processes, which are named `WORKER/PID`.
        """
        ...

    async def commit(
        self, unit: str, *, fence: int, event: Event, version: int = 0, next: NextSteps | None = None,
        charge: dict[str, float] | None = None,
    ) -> Accepted | Refused:  # fmt: skip
        """A step's end (StepDone, StepFailed) with what comes next, or StepRetried, StepInDoubt."""
        ...

    async def plan(self, run_id: str, *, fence: int, version: int, next: NextSteps) -> Accepted | Refused:
        """What an advance planned; Refused("conflict") brings the events that were written in between."""
        ...

    async def hold(self, unit: str, *, fence: int, why: str) -> Accepted | Refused:
        """A leased entry waits for a person; `why` is shown by `open_entries`."""
        ...

    async def signal(self, run_id: str, event: Any) -> Accepted | Refused:
        """Record a human decision: an approval, a denial, a cancellation, a raised limit, a resolution."""
        ...

    async def sweep(
        self, worker: str, *, empty: Sequence[str] = (), look: bool = False, limit: int = 200
    ) -> SweepResult:
        """Give back expired leases, fire due timers, resend lost messages, cancel trees, delete ended runs after their retention.

        Args:
            empty: queues known to have been empty for a second.
            look: the store is the broker too, so find empty queues there.
            limit: how many entries of a kind may move.
        """
        ...

    async def notified(self, run_id: str) -> None:
        """Note that the canvas has received the run's result."""
        ...

    async def events(self, run_id: str, *, after: int = 0) -> list[Event]:
        """The journal of a run, from its `after`-th event on; -1 is the last one."""
        ...

    async def head(self, run_id: str) -> RunHead | None:
        """A run at a glance, or None."""
        ...

    async def runs(self, *, limit: int = 50) -> list[RunHead]:
        """The newest root runs."""
        ...

    async def tree(self, run_id: str) -> list[str]:
        """The run and every run below it."""
        ...

    async def open_entries(self, run_id: str) -> OpenEntries:
        """What moves and what waits in the run's tree; in a time that does not grow with what has ended in it."""
        ...

    def new_events(self, versions: Mapping[str, int]) -> AsyncIterator[tuple[str, Sequence[Event]]]:
        """The new events of many runs, of each that has some, in the order asked for.

        A run may come several times, its events always in order. One that was begun anew comes from its RunStarted on.

        Args:
            versions: for each run, how many of its events the caller has.
        """
        ...

    async def queued(self, queues: Sequence[str]) -> int:
        """How many entries wait for a worker in these broker queues."""
        ...

    async def counts(self) -> JournalCounts:
        """What the journal holds now, at a cost that does not grow with it."""
        ...

    async def stream(self, run_id: str, tokens: Sequence[Token]) -> None:
        """Add to the tree's live stream, which is capped and never the journal."""
        ...

    def tokens(self, run_id: str) -> AsyncIterator[Token]:
        """The tree's live stream from its beginning until the root run ends."""
        ...

    async def watch(self, run_id: str, *, version: int | None, timeout_s: float) -> None:
        """Return when the run's journal is longer than `version` (None: when the run has ended), or after `timeout_s`."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...
