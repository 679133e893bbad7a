"""`run()` and `start()` to await, for programs on an event loop: `await aio.run(Poet(), "the sea")`."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, overload

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.engine.async_run import AsyncRun
from agentmesh.engine.blocking import refuse_inside_step
from agentmesh.message import Message
from agentmesh.runtime.local import local_crew, local_mesh

Out = TypeVar("Out")
T = TypeVar("T")
Awaited = Coroutine[Any, Any, T]


@overload
def start(
    agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True
) -> Awaited[AsyncRun[Out]]: ...
@overload
def start(
    agent: Crew[Out], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True
) -> Awaited[AsyncRun[Out]]: ...
def start(
    agent: Agent[Any, Any] | Crew[Any],
    task: Any = "",
    *,
    run_id: str = "",
    history: Sequence[Message] = (),
    stream: bool = True,
) -> Awaited[AsyncRun[Any]]:
    """Begin a run; see `agentmesh.start`."""
    crew = local_crew(agent)  # here and not in a task of its own: it is named after the caller's file
    return _start(crew, agent.lead if isinstance(agent, Crew) else agent, task, run_id, history, stream)


@overload
def run(
    agent: Agent[Out, Any],
    task: Any = "",
    *,
    run_id: str = "",
    history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Awaited[Out]: ...
@overload
def run(
    agent: Crew[Out],
    task: Any = "",
    *,
    run_id: str = "",
    history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Awaited[Out]: ...
def run(
    agent: Agent[Any, Any] | Crew[Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Awaited[Any]:  # fmt: skip
    """The agent's answer; see `agentmesh.run`."""
    refuse_inside_step("run")
    crew = local_crew(agent)
    return _run(crew, agent.lead if isinstance(agent, Crew) else agent, task, run_id, history, timeout_s)


async def _start(
    crew: Crew[Any], lead: Agent[Any, Any], task: Any, run_id: str, history: Sequence[Message], stream: bool
) -> AsyncRun[Any]:
    mesh = await asyncio.to_thread(local_mesh, crew)
    return await mesh.begin(lead, task, run_id=run_id, history=history, stream=stream)


async def _run(
    crew: Crew[Any], lead: Agent[Any, Any], task: Any, run_id: str, history: Sequence[Message], timeout_s: float | None
) -> Any:
    started = await _start(crew, lead, task, run_id, history, stream=False)
    return await started.result(timeout_s=timeout_s)
