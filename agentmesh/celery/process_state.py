"""The state of a mesh in one process: a journal, an engine, leases. A forked child has its own."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.engine.async_run import RunClient
from agentmesh.engine.dispatch import Dispatch
from agentmesh.engine.engine import Engine
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import Accepted, NewRun, Refused


@dataclass(slots=True)
class ProcessState:
    """Made at first use in a process, so that no connection, thread or lease crosses a fork.

    Args:
        worker: the process's name in leases.
        begin: begins a run; on an eager app it also executes it.
        housekeepers: one for each worker of this process; none until it executes steps.
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
        """The newest housekeeper, or None."""
        return next(reversed(self.housekeepers), None)
