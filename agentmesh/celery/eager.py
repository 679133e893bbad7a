"""`task_always_eager`: a mesh without broker, store and workers. Runs go to their end in this process, at once.

Time skips: a Sleep and a back-off take no time. What waits for a person waits in this process's memory.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from celery import Celery

from agentmesh.celery.event_loop import loop_of_this_process, run_sync
from agentmesh.celery.mesh_runtime import ProcessState
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.step import RUNNING_INSIDE
from agentmesh.engine.executor import StepExecutor
from agentmesh.engine.local_runner import LocalRunner
from agentmesh.engine.replay import History
from agentmesh.engine.run import RunClient
from agentmesh.errors import MeshError, RunError, error_from_json
from agentmesh.journal.events import Event, RunCancelled, RunDone, RunFailed
from agentmesh.journal.types import Accepted, Refused, RunSpec

T = TypeVar("T")


def is_eager(app: Celery) -> bool:
    """Whether the app's tasks are run where they are called."""
    return bool(app.conf.task_always_eager)


def eager_process_state(
    crew: Crew, executor: StepExecutor, worker: str, on_run_end: Callable[[History, Event], None]
) -> ProcessState:
    """What a mesh of an eager app has in this process."""
    settling = LocalRunner(crew, executor, start_ms=_now_ms(), on_run_end=on_run_end)
    one = asyncio.Lock()  # time must not skip while another thread's step is at work

    async def begin(spec: RunSpec) -> Accepted | Refused:
        inside = RUNNING_INSIDE.get()
        if inside:
            raise MeshError(
                f"a run started inside {inside} would wait for itself on an app with task_always_eager: make it an agent's flow"
            )
        wire = settling.dispatch.advance(spec.id, spec.agent, crew.queues.first)
        return await _on_mesh_loop(alone(settling.begin(replace(spec, wire=wire))))

    async def moved() -> None:
        if not RUNNING_INSIDE.get():  # else whoever works on that step goes on with what was told
            await _on_mesh_loop(alone(settling.run_until_idle()))

    async def alone(work: Coroutine[Any, Any, T]) -> T:
        async with one:
            settling.now_ms = max(settling.now_ms, _now_ms())
            return await work

    client = RunClient(crew=crew, journal=settling.journal, run_sync=run_sync, on_change=moved)
    return ProcessState(worker, settling.journal, client, settling.engines[0], settling.dispatch, begin)


def canvas_value(events: Sequence[Event], run_id: str) -> Any:
    """What an eager canvas goes on with.

    Raises:
        RuntimeError: the run failed.
        RunError: it was cancelled, or is waiting for a decision.
    """
    for event in reversed(events):
        if isinstance(event, RunDone):
            return event.value
        if isinstance(event, RunFailed):
            raise RuntimeError(str(error_from_json(event.error)))
        if isinstance(event, RunCancelled):
            raise RunError(f"run {run_id} was cancelled", run_id=run_id)
    raise RunError(
        f"run {run_id} is waiting for a decision, and an eager canvas cannot wait",
        hint=f"see `mesh.get({run_id!r}).waiting_for`",
        run_id=run_id,
    )


async def _on_mesh_loop(work: Coroutine[Any, Any, T]) -> T:
    loop = loop_of_this_process()
    if asyncio.get_running_loop() is loop:
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


def _now_ms() -> int:
    return int(time.time() * 1000)
