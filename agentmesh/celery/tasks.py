"""The tasks, bound to the app they are given to: step and advance. They find their mesh by the crew's name."""

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol

from billiard.exceptions import Terminated, WorkerLostError
from celery import Celery, Task
from celery.worker.request import Request

from agentmesh.celery.loop import drive, greened
from agentmesh.celery.sweep import Tender
from agentmesh.crew import Crew
from agentmesh.engine import Engine
from agentmesh.event import Event

log = logging.getLogger("agentmesh")


class Home(Protocol):
    """A mesh as the tasks and the worker see it."""

    crew: Crew

    def check(self) -> None:
        """Whether broker and journal answer and are safe to use."""
        ...

    def working(self) -> Engine:
        """This process's engine, whose leases are renewed from now on."""
        ...

    def tend(self, *, queues: Sequence[str] = ()) -> Tender:
        """Renew and sweep in this process."""
        ...

    def serves(self) -> list[str]:
        """The broker's names of the crew's queues."""
        ...

    def untend(self, tender: Tender | None = None) -> bool:
        """Stop that, or all of them; whether this process works on no steps of the crew any more."""
        ...

    async def leave(self, pids: Sequence[int]) -> None:
        """Give back what these processes hold."""
        ...

    def name_of(self, pid: int) -> str:
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

    def bury(self, pid: int) -> None:
        """A child of this process died: what it held is given back soon."""
        ...


class StepRequest(Request):  # type: ignore[misc]  # celery is untyped
    """A message in a worker's main process, which hears there of the death of the pool's process that worked on it."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Celery's end of a failed task; a dead process's leases are given back."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError | Terminated | SystemExit):
            self._bury()
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Celery's end of a task that took too long, and whose process is killed for it."""
        super().on_timeout(soft, timeout)
        if not soft and not greened():
            self._bury()

    def _bury(self) -> None:
        home = self.task.homes.get(self.args[0])
        if home is not None and self.worker_pid:
            home.bury(self.worker_pid)


class EngineTask(Task):  # type: ignore[misc]  # celery is untyped
    """A task whose work is a coroutine: our pool awaits it, every other pool drives it."""

    abstract = True
    ignore_result = True
    acks_late = True
    acks_on_failure_or_timeout = True
    reject_on_worker_lost = False
    typing = False
    serializer = "json"
    Request = StepRequest
    homes: dict[str, Home]

    def run(self, *args: Any) -> Any:
        return drive(self.coro(*args))

    async def coro(self, *args: Any) -> Any:
        raise NotImplementedError


class StepTask(EngineTask):
    """One step: an LLM call or a tool call."""

    name = "agentmesh.step"

    async def coro(self, crew: str, run_id: str, n: str, kind: str, queue: str) -> str:
        home = self.homes.get(crew)
        return await home.working().step(run_id, int(n), kind, queue) if home else nobody(crew)


class AdvanceTask(EngineTask):
    """A gather's body, a woken run, a child's beginning."""

    name = "agentmesh.advance"

    async def coro(self, crew: str, run_id: str) -> str:
        home = self.homes.get(crew)
        return await home.working().advance(run_id) if home else nobody(crew)


def nobody(crew: str) -> str:
    """Said where a message came for a crew that this process does not have; the journal sends it again."""
    log.warning(
        "a message for crew %r came to a worker without a mesh of it; import the module that makes the Mesh", crew
    )
    return "no such crew here"


def register(app: Celery) -> dict[str, Home]:
    """Put the tasks on this app and no other; answers the meshes they look in, which all meshes of the app share."""
    if StepTask.name in app.tasks:
        found: dict[str, Home] = app.tasks[StepTask.name].homes
        return found
    homes: dict[str, Home] = {}
    for cls in (StepTask, AdvanceTask):
        task = cls()
        task.homes = homes
        app.register_task(task)
    return homes
