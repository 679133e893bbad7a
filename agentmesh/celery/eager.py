"""`task_always_eager`: a mesh without broker, store and workers. Runs are executed in this process, by the call that begins them.

Time is simulated: a Sleep and a back-off take no time. Blocked runs are kept in this process's memory.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from celery import Celery

from agentmesh.celery.event_loop import loop_of_this_process, run_sync
from agentmesh.celery.process_state import ProcessState
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.step import RUNNING_INSIDE
from agentmesh.engine.async_run import RunClient
from agentmesh.engine.executor import StepExecutor
from agentmesh.engine.local_runner import LocalRunner
from agentmesh.engine.replay import History
from agentmesh.errors import MeshError, RunError, error_from_json
from agentmesh.journal.events import Event, RunCancelled, RunDone, RunFailed
from agentmesh.journal.types import Accepted, NewRun, Refused

T = TypeVar("T")


def is_eager(app: Celery) -> bool:
    """Whether the app executes tasks where they are called."""
    return bool(app.conf.task_always_eager)


def eager_process_state(
    crew: Crew, executor: StepExecutor, worker: str, on_run_end: Callable[[History, Event], None]
) -> ProcessState:
    """The process state of a mesh on an eager app."""
    runner = LocalRunner(crew, executor, start_ms=_now_ms(), on_run_end=on_run_end)
    lock = asyncio.Lock()  # simulated time must not advance while another thread's step runs

    async def begin(new: NewRun) -> Accepted | Refused:
        inside = RUNNING_INSIDE.get()
        if inside:
            raise MeshError(
                f"a run started inside {inside} would wait for itself on an app with task_always_eager",
                hint="make it an agent's flow",
            )
        wire = runner.dispatch.advance(new.run_id, new.spec.agent, crew.queues.first)
        return await _on_mesh_loop(exclusive(runner.begin(replace(new, wire=wire))))

    async def on_change() -> None:
        if not RUNNING_INSIDE.get():  # otherwise the caller that executes the step continues the run
            await _on_mesh_loop(exclusive(runner.run_until_idle()))

    async def exclusive(work: Coroutine[Any, Any, T]) -> T:
        async with lock:
            runner.now_ms = max(runner.now_ms, _now_ms())
            return await work

    client = RunClient(crew=crew, journal=runner.journal, run_sync=run_sync, on_change=on_change)
    return ProcessState(worker, runner.journal, client, runner.engines[0], runner.dispatch, begin)


def canvas_value(events: Sequence[Event], run_id: str) -> Any:
    """The run's value, with which an eager canvas continues.

    Raises:
        RuntimeError: the run failed.
        RunError: the run was cancelled, or is waiting for a decision.
    """
    for event in reversed(events):
        if isinstance(event, RunDone):
            return event.value
        if isinstance(event, RunFailed):
            raise RuntimeError(str(error_from_json(event.error)))
        if isinstance(event, RunCancelled):
            raise RunError(f"run {run_id!r} was cancelled", run_id=run_id)
    raise RunError(
        f"run {run_id!r} is waiting for a decision, and an eager canvas cannot wait",
        hint=f"decide it: mesh.get({run_id!r}).waiting_for() lists what it waits for",
        run_id=run_id,
    )


async def _on_mesh_loop(work: Coroutine[Any, Any, T]) -> T:
    loop = loop_of_this_process()
    if asyncio.get_running_loop() is loop:
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


def _now_ms() -> int:
    return int(time.time() * 1000)
