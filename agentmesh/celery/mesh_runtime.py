"""A mesh as the tasks and the worker see it, and what it has in one process. A forked child has its own of each."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.definitions.crew import Crew
from agentmesh.engine.dispatch import Dispatch
from agentmesh.engine.engine import Engine
from agentmesh.engine.run import RunClient
from agentmesh.journal.events import Event
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import Accepted, NewRun, Refused


@dataclass(slots=True)
class ProcessState:
    """Made at first use in a process, so that no connection, thread or lease crosses a fork.

    Args:
        worker: the process's name in leases.
        begin: begins a run; of an eager app, and sees it through.
        tenders: one for each worker of this process; none until it works on steps.
    """

    worker: str
    journal: Journal
    client: RunClient
    engine: Engine
    dispatch: Dispatch
    begin: Callable[[NewRun], Awaitable[Accepted | Refused]]
    housekeepers: list[Housekeeper] = field(default_factory=list)

    @property
    def housekeeper(self) -> Housekeeper | None:
        """The newest, or None."""
        return next(reversed(self.housekeepers), None)


# ---- The tasks, bound to the app they are given to ----------------------------------------------


class MeshRuntime(Protocol):
    """A mesh as the tasks and the worker see it."""

    crew: Crew

    def check(self) -> None:
        """Whether broker and journal answer and are safe to use."""
        ...

    def active_engine(self) -> Engine:
        """This process's engine, whose leases are renewed from now on."""
        ...

    def start_housekeeping(self, *, queues: Sequence[str] = ()) -> Housekeeper:
        """Renew and sweep in this process."""
        ...

    def broker_queues(self) -> list[str]:
        """The broker's names of the crew's queues."""
        ...

    def stop_housekeeping(self, tender: Housekeeper | None = None) -> bool:
        """Stop that, or all of them; whether this process works on no steps of the crew any more."""
        ...

    async def release_processes(self, pids: Sequence[int]) -> None:
        """Give back what these processes hold."""
        ...

    def lease_name(self, pid: int) -> str:
        """The name under which a process holds leases."""
        ...

    def begin_for_canvas(
        self, agent: str, task: Any, run_id: str, saved: dict[str, Any], fields: dict[str, Any]
    ) -> Sequence[Event]:
        """Begin a run that a canvas waits for; of an eager app, its events to the end."""
        ...

    def begin_scheduled(self, name: str, now: datetime) -> str:
        """Begin the run of a schedule that is due; its id."""
        ...

    def release_dead(self, pid: int) -> None:
        """A child of this process died: what it held is given back soon."""
        ...
