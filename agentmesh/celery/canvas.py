"""Agents in a user's canvas: runs as Celery tasks, and the report of their results to the result backend.

Celery's Redis backend forgets the size of a chord `result_expires` after its last part came, and then counts for ever:
no body, no error. A run that ends later than that fails the chord, so that its result and its errbacks say what happened.
"""

import asyncio
import json
import logging
import time
from typing import Any

from celery import Celery, Task, signature
from celery.app.task import Context
from celery.exceptions import ChordError, Ignore
from celery.result import AsyncResult
from celery.states import READY_STATES
from kombu.utils import json as kombu_json
from kombu.utils.uuid import uuid

from agentmesh.celery.eager import canvas_value, is_eager
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.celery.tasks import EngineTask, unknown_crew
from agentmesh.engine.engine import Engine
from agentmesh.errors import DefinitionError, MeshError, error_from_json
from agentmesh.journal.events import RunDone, RunFailed, RunStarted
from agentmesh.journal.types import Claimed, finish_unit

log = logging.getLogger("agentmesh")

FAILED_CHORD_TTL_S = 86_400  # how long other late parts see that the chord was failed


def fail_if_expired(app: Any, backend: Any, request: Any, waited_s: float) -> bool:
    """Fail the chord of this part if Celery has forgotten it; whether it had.

    Args:
        request: the request of the part, with its chord and group.
        waited_s: how long ago the part was begun.
    """
    expires_s = getattr(backend, "chord_expires", None)
    if not hasattr(backend, "_chord_part_return_script") or not expires_s or waited_s < expires_s:
        return False
    size, claim = (backend.get_key_for_group(request.group, part) for part in (".s", ".c"))
    body = signature(request.chord, app=app)
    # An ended chord has no size either, and is not failed.
    if backend.client.exists(size, claim) or any(backend.get_state(id) in READY_STATES for id in _task_ids(body)):
        return False
    message = (
        f"run {request.id} took {waited_s:.0f} s, and Celery forgets a chord {expires_s:.0f} s after its last part; set "
        "`result_chord_expires` of your app longer than your longest wait"
    )
    log.error(message)
    try:
        raise ChordError(message)  # Celery reads it from the stack
    except ChordError as error:
        backend.chord_error_from_stack(body, error)
    backend.client.set(claim, "done", ex=FAILED_CHORD_TTL_S)
    return True


def _task_ids(body: Any) -> list[str]:
    return [task.id for task in (body, *(getattr(body, "tasks", None) or ())) if getattr(task, "id", None)]


# ---- Agents as Celery signatures ----------------------------------------------------------------

SAVED_FIELDS = ("group", "group_index", "chord", "chain", "callbacks", "errbacks", "root_id", "parent_id", "reply_to",
        "replaced_task_nesting", "ignore_result")  # fmt: skip


class AgentTask(Task):  # type: ignore[misc]  # celery is untyped
    """A run as a task of the user's canvas. The task's id is the run's."""

    name = "agentmesh.agent"
    acks_late = True
    typing = False
    serializer = "json"
    meshes: dict[str, MeshRuntime]

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, producer: Any = None, link: Any = None,
        link_error: Any = None, shadow: Any = None, **options: Any,
    ) -> AsyncResult:  # fmt: skip
        """Begin the run; returns the result that the canvas waits for."""
        if is_eager(self.app):
            return super().apply_async(
                args,
                kwargs,
                task_id=task_id,
                producer=producer,
                link=link,
                link_error=link_error,
                shadow=shadow,
                **options,
            )
        options = {**self._get_exec_options(), **options}
        request = {
            "group": options.get("group_id"), "callbacks": _as_list(link), "errbacks": _as_list(link_error),
            **{name: options.get(name) for name in SAVED_FIELDS if name in options and name not in ("callbacks", "errbacks")},
        }  # fmt: skip
        run_id = task_id or uuid()
        if hasattr(self.backend, "oid"):  # rpc://: the result is a message to this thread's own queue
            request["reply_to"] = request.get("reply_to") or self.app.thread_oid
            with self.app.producer_or_acquire(producer) as open_producer:
                self.backend.on_task_call(open_producer, run_id)
        self._begin(run_id, args or (), dict(kwargs or {}), request)
        return self.AsyncResult(run_id)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Only for Celery's tracer.

        Raises:
            DefinitionError: called by `map`, `starmap` or `chunks`, or as a function.
        """
        if self.request.called_directly:
            raise DefinitionError(  # with the hint in the message: result backends keep only that
                "an agent called as a function, or by Celery's `map`, `starmap` or `chunks`, would block this worker: "
                "write `mesh.map(agent, tasks)` in a canvas, and `mesh.run(agent, task)` outside of workers"
            )
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """A message of this task that another program published: begin the run; `report_end` reports its result."""
        request = {name: getattr(self.request, name, None) for name in SAVED_FIELDS}
        events = self._begin(self.request.id, args, kwargs, request)
        if is_eager(self.app):
            return canvas_value(events, self.request.id)
        raise Ignore

    def _begin(self, run_id: str, args: Any, kwargs: dict[str, Any], request: dict[str, Any]) -> Any:
        runtime = self.meshes.get(kwargs.get("crew", ""))
        if runtime is None:
            raise DefinitionError(
                f"there is no Mesh of crew {kwargs.get('crew')!r} on this app in this process",
                hint="import the module that creates it",
            )
        saved = {name: value for name, value in request.items() if value is not None} | {"id": run_id}
        return runtime.begin_for_canvas(
            kwargs["agent"], args[0] if args else "", run_id, _to_plain_json(saved), kwargs["fields"]
        )


class FinishTask(EngineTask):
    """Reports a run's end to the result backend; repeated until the backend has it."""

    name = "agentmesh.finish"

    async def coro(self, crew: str, run_id: str) -> str:
        runtime = self.meshes.get(crew)
        return await report_end(self.app, runtime.active_engine(), run_id) if runtime else unknown_crew(crew)


async def report_end(app: Celery, engine: Engine, run_id: str) -> str:
    """Report a run's end to the app's result backend, then mark it as notified in the journal."""
    claimed = await engine.claim_unit(finish_unit(run_id), run_id)
    if not isinstance(claimed, Claimed):
        return claimed.why
    events = await engine.journal.events(run_id)
    started, end = (
        events[0],
        next(e for e in reversed(events) if type(e).__name__ in ("RunDone", "RunFailed", "RunCancelled")),
    )
    assert isinstance(started, RunStarted)
    try:
        waited_s = time.time() - started.at_ms / 1000
        if await asyncio.to_thread(report_to_backend, app, dict(started.canvas or {}), end, waited_s):
            await engine.journal.notified(run_id)
    finally:
        engine.leases.pop(finish_unit(run_id), None)
    return "notified"


def report_to_backend(app: Celery, saved: dict[str, Any], end: Any, waited_s: float = 0.0) -> bool:
    """Do what Celery's tracer does at the end of a task; whether all of it is certain to have happened."""
    request = Context(saved, called_directly=False, delivery_info={}, task=AgentTask.name)
    task = app.tasks[AgentTask.name]
    if isinstance(end, RunDone):
        for link in request.callbacks or ():
            signature(link, app=app).apply_async((end.value,), parent_id=request.id, root_id=request.root_id)
        if request.chain:
            rest = list(request.chain)
            signature(rest.pop(), app=app).apply_async(
                (end.value,), chain=rest, parent_id=request.id, root_id=request.root_id
            )
        task.backend.mark_as_done(request.id, end.value, request=request)
    else:
        error = (
            error_from_json(end.error) if isinstance(end, RunFailed) else MeshError(f"run {request.id} was cancelled")
        )
        task.backend.mark_as_failure(request.id, RuntimeError(str(error)), request=request)
    if not request.chord or fail_if_expired(app, task.backend, request, waited_s):
        return True
    return _is_join_over(task.backend, request.group)


def _is_join_over(backend: Any, group: str) -> bool:
    """Whether Celery's own join is not interrupted: its claim is gone, or says that the body is sent."""
    if not hasattr(backend, "_chord_part_return_script"):
        return True  # other backends count without a claim
    return backend.client.get(backend.get_key_for_group(group, ".c")) in (None, b"done", "done")


def _to_plain_json(saved: dict[str, Any]) -> Any:
    """Signatures and everything else as plain JSON values."""
    dumps: Any = kombu_json.dumps  # kombu is untyped
    return json.loads(dumps(saved))


def _as_list(link: Any) -> list[Any] | None:
    if link is None:
        return None
    return [dict(x) for x in link] if isinstance(link, list | tuple) else [dict(link)]


def register_canvas(app: Celery, meshes: dict[str, MeshRuntime]) -> None:
    """Register the agent task and the finish task on this app."""
    if AgentTask.name in app.tasks:
        return
    for cls in (AgentTask, FinishTask):
        task = cls()
        task.meshes = meshes
        app.register_task(task)
