"""The three tasks, bound to the app they are given to: step, advance, finish. They find their engine by the crew's name."""

from collections.abc import Mapping
from typing import Any

from celery import Celery, Task

from agentmesh.celery.loop import drive
from agentmesh.engine import Engine

Engines = Mapping[str, Engine]


class EngineTask(Task):  # type: ignore[misc]  # celery is untyped
    """A task whose work is a coroutine: our pool awaits it, every other pool drives it."""

    abstract = True
    ignore_result = True
    acks_late = True
    acks_on_failure_or_timeout = True
    typing = False
    serializer = "json"
    engines: Engines

    def run(self, *args: Any) -> Any:
        return drive(self.coro(*args))

    async def coro(self, *args: Any) -> Any:
        raise NotImplementedError


class StepTask(EngineTask):
    """One step: an LLM call or a tool call."""

    name = "agentmesh.step"

    async def coro(self, crew: str, run_id: str, n: str, kind: str, queue: str) -> str:
        engine = self.engines.get(crew)
        return await engine.step(run_id, int(n), kind, queue) if engine else "no such crew here"


class AdvanceTask(EngineTask):
    """A gather's body, a woken run, a child's beginning."""

    name = "agentmesh.advance"

    async def coro(self, crew: str, run_id: str) -> str:
        engine = self.engines.get(crew)
        return await engine.advance(run_id) if engine else "no such crew here"


def register(app: Celery) -> dict[str, Engine]:
    """Put the tasks on this app and no other; answers the engines they look in, which all meshes of the app share."""
    if StepTask.name in app.tasks:
        found: dict[str, Engine] = app.tasks[StepTask.name].engines
        return found
    engines: dict[str, Engine] = {}
    for cls in (StepTask, AdvanceTask):
        task = cls()
        task.engines = engines
        app.register_task(task)
    return engines
