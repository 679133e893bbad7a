"""The Celery tasks step and advance, registered on one app. They find their mesh by the crew's name."""

import logging
from typing import Any

from billiard.exceptions import Terminated, WorkerLostError
from celery import Celery, Task
from celery.worker.request import Request

from agentmesh.celery.event_loop import run_sync, threads_are_green
from agentmesh.celery.mesh_runtime import MeshRuntime

log = logging.getLogger("agentmesh")


class StepRequest(Request):  # type: ignore[misc]  # celery is untyped
    """A message in a worker's main process, which learns there that the pool's process working on it has died."""

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Celery's handling of a failed task; the leases of a dead process are released."""
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError | Terminated | SystemExit):
            self._release_process()
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Celery's handling of a task over its time limit, whose process is killed."""
        super().on_timeout(soft, timeout)
        if not soft and not threads_are_green():
            self._release_process()

    def _release_process(self) -> None:
        runtime = self.task.meshes.get(self.args[0])
        if runtime is not None and self.worker_pid:
            runtime.release_dead(self.worker_pid)


class EngineTask(Task):  # type: ignore[misc]  # celery is untyped
    """A task whose work is a coroutine: our pool awaits it, every other pool runs it with `run_sync`."""

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
    """One step: a model call or a tool call."""

    name = "agentmesh.step"

    async def coro(self, crew: str, run_id: str, n: str, kind: str, queue: str) -> str:
        runtime = self.meshes.get(crew)
        return await runtime.active_engine().step(run_id, int(n), queue) if runtime else unknown_crew(crew)


class AdvanceTask(EngineTask):
    """Continue a run: the body of a gather, a run whose timer is due, or the beginning of a sub-agent's run."""

    name = "agentmesh.advance"

    async def coro(self, crew: str, run_id: str) -> str:
        runtime = self.meshes.get(crew)
        return await runtime.active_engine().advance(run_id) if runtime else unknown_crew(crew)


def unknown_crew(crew: str) -> str:
    """Log that this process has no Mesh for the crew of a message; the journal re-sends the message."""
    log.warning(
        "received a message for crew %r, which has no Mesh in this worker: import the module that creates it", crew
    )
    return "no such crew here"


def register_tasks(app: Celery) -> dict[str, MeshRuntime]:
    """Register the tasks on this app and no other; returns the dictionary of meshes, which all meshes of the app share."""
    if StepTask.name in app.tasks:
        meshes: dict[str, MeshRuntime] = app.tasks[StepTask.name].meshes
        return meshes
    runtimes: dict[str, MeshRuntime] = {}
    for cls in (StepTask, AdvanceTask):
        task = cls()
        task.meshes = runtimes
        app.register_task(task)
    return runtimes
