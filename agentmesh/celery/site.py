"""What a mesh has in one process: its journal, its engine, its tender. A forked child has its own of each."""

from dataclasses import dataclass

from agentmesh.celery.sweep import Tender
from agentmesh.engine import Engine
from agentmesh.journal import Journal
from agentmesh.run import Client


@dataclass(slots=True)
class Site:
    """Made at first use in a process, so that no connection, thread or lease crosses a fork.

    Args:
        worker: the process's name in leases.
        tender: None until this process works on steps.
    """

    worker: str
    journal: Journal
    client: Client
    engine: Engine
    tender: Tender | None = None
