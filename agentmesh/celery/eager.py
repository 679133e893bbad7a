"""`task_always_eager`: a mesh without broker, store and workers. Runs go to their end in this process, at once.

Time skips: a Sleep and a back-off take no time. What waits for a person waits in this process's memory.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from celery import Celery

from agentmesh.celery.loop import drive, loop_of_this_process
from agentmesh.celery.site import Site
from agentmesh.crew import Crew
from agentmesh.doing import Doing
from agentmesh.errors import MeshError, RunError, error_from_json
from agentmesh.event import Event, RunCancelled, RunDone, RunFailed
from agentmesh.ports import Accepted, Refused, RunSpec
from agentmesh.replay import History
from agentmesh.run import Client
from agentmesh.settle import Settling
from agentmesh.step import INSIDE

T = TypeVar("T")


def is_eager(app: Celery) -> bool:
    """Whether the app's tasks are run where they are called."""
    return bool(app.conf.task_always_eager)


def eager_site(crew: Crew, doer: Doing, worker: str, ended: Callable[[History, Event], None]) -> Site:
    """What a mesh of an eager app has in this process."""
    settling = Settling(crew, doer, start_ms=_now_ms(), ended=ended)
    one = asyncio.Lock()  # time must not skip while another thread's step is at work

    async def begin(spec: RunSpec) -> Accepted | Refused:
        inside = INSIDE.get()
        if inside:
            raise MeshError(
                f"a run begun inside {inside} would wait for itself on an app with task_always_eager: make it an agent's flow"
            )
        wire = settling.dispatch.advance(spec.id, spec.agent, crew.queue)
        return await _on_our_loop(alone(settling.begin(replace(spec, wire=wire))))

    async def moved() -> None:
        if not INSIDE.get():  # else whoever works on that step goes on with what was told
            await _on_our_loop(alone(settling.settle()))

    async def alone(work: Coroutine[Any, Any, T]) -> T:
        async with one:
            settling.now_ms = max(settling.now_ms, _now_ms())
            return await work

    client = Client(crew=crew, journal=settling.journal, drive=drive, moved=moved)
    return Site(worker, settling.journal, client, settling.engines[0], settling.dispatch, begin)


def value_of(events: Sequence[Event], run_id: str) -> Any:
    """What an eager canvas goes on with.

    Raises:
        RuntimeError: the run failed.
        RunError: it was cancelled, or waits for somebody.
    """
    for event in reversed(events):
        if isinstance(event, RunDone):
            return event.value
        if isinstance(event, RunFailed):
            raise RuntimeError(str(error_from_json(event.error)))
        if isinstance(event, RunCancelled):
            raise RunError(f"run {run_id} was cancelled", run_id=run_id)
    raise RunError(
        f"run {run_id} waits for somebody, and an eager canvas cannot; ask `mesh.get({run_id!r}).waiting_for`",
        run_id=run_id,
    )


async def _on_our_loop(work: Coroutine[Any, Any, T]) -> T:
    loop = loop_of_this_process()
    if asyncio.get_running_loop() is loop:
        return await work
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))


def _now_ms() -> int:
    return int(time.time() * 1000)
