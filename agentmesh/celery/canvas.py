"""Agents as Celery signatures: `mesh.s(agent, task)` in the user's own chain, group or chord. Holds no worker.

Publishing such a signature writes the run's beginning instead of an entry message, which a worker that prefetched it
could take to its grave. When the run ends, a leased and repeatable `finish` reports to the app's own result backend.
"""

import asyncio
import json
import time
from typing import Any

from celery import Celery, Task, signature
from celery.app.task import Context
from celery.exceptions import Ignore
from celery.result import AsyncResult
from kombu.utils import json as kombu_json
from kombu.utils.uuid import uuid

from agentmesh.celery.eager import is_eager, value_of
from agentmesh.celery.lapse import fail_if_lapsed
from agentmesh.celery.tasks import EngineTask, Home, nobody
from agentmesh.engine import Engine
from agentmesh.errors import DefinitionError, MeshError, error_from_json
from agentmesh.event import RunDone, RunFailed, RunStarted
from agentmesh.ports import Claimed, finish_unit

KEPT = ("group", "group_index", "chord", "chain", "callbacks", "errbacks", "root_id", "parent_id", "reply_to",
        "replaced_task_nesting", "ignore_result")  # fmt: skip


class AgentTask(Task):  # type: ignore[misc]  # celery is untyped
    """A run as a task of the user's canvas. Its id is the run's."""

    name = "agentmesh.agent"
    acks_late = True
    typing = False
    serializer = "json"
    homes: dict[str, Home]

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, producer: Any = None, link: Any = None,
        link_error: Any = None, shadow: Any = None, **options: Any,
    ) -> AsyncResult:  # fmt: skip
        """Begin the run; answers the result that the canvas waits for."""
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
            "group": options.get("group_id"), "callbacks": _listed(link), "errbacks": _listed(link_error),
            **{name: options.get(name) for name in KEPT if name in options and name not in ("callbacks", "errbacks")},
        }  # fmt: skip
        run_id = task_id or uuid()
        if hasattr(self.backend, "oid"):  # rpc://: the result is a message to this thread's own queue
            request["reply_to"] = request.get("reply_to") or self.app.thread_oid
            with self.app.producer_or_acquire(producer) as sender:
                self.backend.on_task_call(sender, run_id)
        self._begin(run_id, args or (), dict(kwargs or {}), request)
        return self.AsyncResult(run_id)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's tracer alone may call it.

        Raises:
            DefinitionError: `map`, `starmap` or `chunks` did, or code that wanted the agent's answer.
        """
        if self.request.called_directly:
            raise DefinitionError(
                "an agent called as a function would hold this worker: write `mesh.map(agent, tasks)` where Celery's "
                "`map`, `starmap` or `chunks` would be, and `mesh.run(agent, task)` outside of workers"
            )
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """A message of this task that somebody else published: begin the run, and let `finish` answer for it."""
        request = {name: getattr(self.request, name, None) for name in KEPT}
        events = self._begin(self.request.id, args, kwargs, request)
        if is_eager(self.app):
            return value_of(events, self.request.id)
        raise Ignore

    def _begin(self, run_id: str, args: Any, kwargs: dict[str, Any], request: dict[str, Any]) -> Any:
        home = self.homes.get(kwargs.get("crew", ""))
        if home is None:
            raise DefinitionError(f"no mesh of crew {kwargs.get('crew')!r} was made on this app in this process")
        saved = {name: value for name, value in request.items() if value is not None} | {"id": run_id}
        return home.begin_for_canvas(kwargs["agent"], args[0] if args else "", run_id, _plain(saved), kwargs["fields"])


class FinishTask(EngineTask):
    """Tells a canvas of a run's end; repeated until the backend has it."""

    name = "agentmesh.finish"

    async def coro(self, crew: str, run_id: str) -> str:
        home = self.homes.get(crew)
        return await finish(self.app, home.working(), run_id) if home else nobody(crew)


async def finish(app: Celery, engine: Engine, run_id: str) -> str:
    """Report a run's end to the app's result backend, then strike it off."""
    claimed = await engine.take(finish_unit(run_id), run_id)
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
        if await asyncio.to_thread(report, app, dict(started.canvas or {}), end, waited_s):
            await engine.journal.told(run_id)
    finally:
        engine.leases.pop(finish_unit(run_id), None)
    return "told"


def report(app: Celery, saved: dict[str, Any], end: Any, waited_s: float = 0.0) -> bool:
    """What Celery's tracer would have done at the end of a task; whether all of it is certain to have happened."""
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
    if not request.chord or fail_if_lapsed(app, task.backend, request, waited_s):
        return True
    return _joined(task.backend, request.group)


def _joined(backend: Any, group: str) -> bool:
    """Whether Celery's own join is not in the middle of dying: its claim is gone, or says that the body is sent."""
    if not hasattr(backend, "_chord_part_return_script"):
        return True  # other backends count without a claim
    return backend.client.get(backend.get_key_for_group(group, ".c")) in (None, b"done", "done")


def _plain(saved: dict[str, Any]) -> Any:
    """Signatures and all, as JSON."""
    dumps: Any = kombu_json.dumps  # kombu is untyped
    return json.loads(dumps(saved))


def _listed(link: Any) -> list[Any] | None:
    if link is None:
        return None
    return [dict(x) for x in link] if isinstance(link, list | tuple) else [dict(link)]


def register(app: Celery, homes: dict[str, Home]) -> None:
    """Put the agent's and the finish task on this app."""
    if AgentTask.name in app.tasks:
        return
    for cls in (AgentTask, FinishTask):
        task = cls()
        task.homes = homes
        app.register_task(task)
