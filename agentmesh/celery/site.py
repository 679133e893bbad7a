"""What a mesh has in one process: its journal, its engine, its tender. A forked child has its own of each."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from agentmesh.celery.sweep import Tender
from agentmesh.engine import Engine
from agentmesh.journal import Journal
from agentmesh.ports import Accepted, Dispatch, Refused, RunSpec
from agentmesh.run import Client


@dataclass(slots=True)
class Site:
    """Made at first use in a process, so that no connection, thread or lease crosses a fork.

    Args:
        worker: the process's name in leases.
        begin: begins a run; of an eager app, and sees it through.
        tenders: one for each worker of this process; none until it works on steps.
    """

    worker: str
    journal: Journal
    client: Client
    engine: Engine
    dispatch: Dispatch
    begin: Callable[[RunSpec], Awaitable[Accepted | Refused]]
    tenders: list[Tender] = field(default_factory=list)

    @property
    def tender(self) -> Tender | None:
        """The newest, or None."""
        return next(reversed(self.tenders), None)
