"""The tasks, bound to the app they are given to: step and advance. They find their mesh by the crew's name."""

import logging
from typing import Any

from billiard.exceptions import Terminated, WorkerLostError
from celery import Celery, Task
from celery.worker.request import Request

from agentmesh.celery.event_loop import run_sync, threads_are_green
from agentmesh.celery.mesh_runtime import MeshRuntime

log = logging.getLogger("agentmesh")


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
        if not soft and not threads_are_green():
            self._bury()

    def _bury(self) -> None:
        home = self.task.meshes.get(self.args[0])
        if home is not None and self.worker_pid:
            home.release_dead(self.worker_pid)


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
    meshes: dict[str, MeshRuntime]

    def run(self, *args: Any) -> Any:
        return run_sync(self.coro(*args))

    async def coro(self, *args: Any) -> Any:
        raise NotImplementedError


class StepTask(EngineTask):
    """One step: an LLM call or a tool call."""

    name = "agentmesh.step"

    async def coro(self, crew: str, run_id: str, n: str, kind: str, queue: str) -> str:
        home = self.meshes.get(crew)
        return await home.active_engine().step(run_id, int(n), queue) if home else unknown_crew(crew)


class AdvanceTask(EngineTask):
    """A gather's body, a woken run, a child's beginning."""

    name = "agentmesh.advance"

    async def coro(self, crew: str, run_id: str) -> str:
        home = self.meshes.get(crew)
        return await home.active_engine().advance(run_id) if home else unknown_crew(crew)


def unknown_crew(crew: str) -> str:
    """Said where a message came for a crew that this process does not have; the journal sends it again."""
    log.warning(
        "received a message for crew %r, which has no Mesh in this worker; import the module that creates it", crew
    )
    return "no such crew here"


def register_tasks(app: Celery) -> dict[str, MeshRuntime]:
    """Put the tasks on this app and no other; answers the meshes they look in, which all meshes of the app share."""
    if StepTask.name in app.tasks:
        meshes: dict[str, MeshRuntime] = app.tasks[StepTask.name].meshes
        return meshes
    homes: dict[str, MeshRuntime] = {}
    for cls in (StepTask, AdvanceTask):
        task = cls()
        task.meshes = homes
        app.register_task(task)
    return homes
