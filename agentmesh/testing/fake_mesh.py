"""A mesh without servers: the real engine over the memory journal, in this thread, with a clock that skips ahead."""

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, overload

from agentmesh.celery.event_loop import run_sync
from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.engine.async_run import AsyncRun, RunClient
from agentmesh.engine.blocking import refuse_inside_step, refuse_on_event_loop, waits
from agentmesh.engine.executor import LocalExecutor
from agentmesh.engine.local_runner import LocalRunner
from agentmesh.engine.planner import root_run
from agentmesh.engine.run import Run
from agentmesh.errors import RunError
from agentmesh.journal.types import Refused, RunHead
from agentmesh.message import Message
from agentmesh.model import Model, model_name
from agentmesh.testing.scripted import ScriptedModel

Out = TypeVar("Out")
T = TypeVar("T")


class AsyncFakeMesh:
    """FakeMesh's words to await. `mesh.aio` is one."""

    def __init__(self, runner: LocalRunner, client: RunClient, executor: LocalExecutor) -> None:
        self._runner, self._client, self._executor = runner, client, executor
        self._numbers = itertools.count(1)

    @overload
    async def start(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True,
        origin: str = "",
    ) -> AsyncRun[Out]: ...  # fmt: skip
    @overload
    async def start(
        self, agent: Any, *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True, origin: str = ""
    ) -> AsyncRun[Any]: ...
    async def start(
        self, agent: Any, task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True,
        origin: str = "",
    ) -> AsyncRun[Any]:  # fmt: skip
        """Begin a run and continue until it ends or is waiting for a decision."""
        crew = self._runner.crew
        lead, task = (agent, task) if isinstance(agent, Agent) else (crew.lead, agent)
        new = root_run(
            crew, self._runner.dispatch, lead, task, run_id=run_id or f"r{next(self._numbers)}", queue="", history=history,
            origin=origin, stream=stream,
        )  # fmt: skip
        if isinstance(await self._runner.begin(new), Refused):
            raise RunError(
                f"run {new.run_id!r} already exists with another task", hint="use another id", run_id=new.run_id
            )
        return self.get(new.run_id)

    @overload
    async def run(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (),
        timeout_s: float | None = None,
    ) -> Out: ...  # fmt: skip
    @overload
    async def run(
        self, agent: Any, *, run_id: str = "", history: Sequence[Message] = (), timeout_s: float | None = None
    ) -> Any: ...
    async def run(
        self,
        agent: Any,
        task: Any = "",
        *,
        run_id: str = "",
        history: Sequence[Message] = (),
        timeout_s: float | None = None,
    ) -> Any:
        """`start` and its result."""
        refuse_inside_step("run")
        started = await self.start(agent, task, run_id=run_id, history=history)
        return await started.result(timeout_s=timeout_s)

    def get(self, run_id: str) -> AsyncRun[Any]:
        """A handle to a run; whether it exists shows when it is used."""
        return self._client.get(run_id)

    async def runs(self, *, limit: int = 50) -> list[RunHead]:
        """The newest root runs."""
        return await self._runner.journal.runs(limit=limit)

    async def check(self) -> None:
        """Nothing: there are no servers."""

    async def close(self) -> None:
        """Let go of the threads that `def` tools run in."""
        self._executor.close()


class FakeMesh:
    """Runs agents to where nothing more can happen, at once: for tests of crews. It has Mesh's face, but for Celery's words.

    Time is the journal's own and skips ahead to the next timer; nothing waits. Where a call takes an agent, a task alone
    is for the leading one.

    Args:
        model: replies in order (`says`, `uses`), a function of the Prompt, or a Model; serves every agent.
        workers: how many engines share the work, each with a cache of its own.

    Attributes:
        aio: the same mesh with the same words to await.
        runner: what does the work: its journal, its clock, its messages.
        model: what answers; a ScriptedModel has the `prompts` so far.
    """

    def __init__(
        self, agent: Agent[Any, Any] | Crew, *, model: Any = (), workers: int = 1, start_ms: int = 1_000_000
    ) -> None:
        self.crew = crew = agent if isinstance(agent, Crew) else Crew(agent)
        self.model: Model = model if hasattr(model, "ask") else ScriptedModel(model)
        executor = LocalExecutor(
            model_of=lambda name: (self.model, model_name(name)), servers_of=crew.queues.servers_of, model=crew.model, deps=crew.deps,
            threads=4,
        )  # fmt: skip
        self.runner = LocalRunner(crew, executor, start_ms=start_ms, workers=workers)
        client = RunClient(
            crew=crew, journal=self.runner.journal, run_sync=_run_here, on_change=self.runner.run_until_idle,
            dispatch=self.runner.dispatch,
        )  # fmt: skip
        self.aio = AsyncFakeMesh(self.runner, client, executor)

    @overload
    def start(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True,
        origin: str = "",
    ) -> Run[Out]: ...  # fmt: skip
    @overload
    def start(
        self, agent: Any, *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True, origin: str = ""
    ) -> Run[Any]: ...
    def start(
        self, agent: Any, task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True,
        origin: str = "",
    ) -> Run[Any]:  # fmt: skip
        """Begin a run and continue until it ends or is waiting for a decision."""
        refuse_inside_step("start")
        refuse_on_event_loop("mesh.start()", "await mesh.begin(…)")
        started = self.aio.start(agent, task, run_id=run_id, history=history, stream=stream, origin=origin)
        return Run(_run_here(started))

    @overload
    def run(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (),
        timeout_s: float | None = None,
    ) -> Out: ...  # fmt: skip
    @overload
    def run(
        self, agent: Any, *, run_id: str = "", history: Sequence[Message] = (), timeout_s: float | None = None
    ) -> Any: ...
    def run(
        self,
        agent: Any,
        task: Any = "",
        *,
        run_id: str = "",
        history: Sequence[Message] = (),
        timeout_s: float | None = None,
    ) -> Any:
        """`start` and its result.

        Raises:
            TimeoutError: the run is waiting for a decision.
        """
        refuse_inside_step("run")
        refuse_on_event_loop("mesh.run()", "await mesh.aio.run(…)")
        return _run_here(self.aio.run(agent, task, run_id=run_id, history=history, timeout_s=timeout_s))

    @overload
    async def begin(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True,
        origin: str = "",
    ) -> AsyncRun[Out]: ...  # fmt: skip
    @overload
    async def begin(
        self, agent: Any, *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True, origin: str = ""
    ) -> AsyncRun[Any]: ...
    async def begin(
        self, agent: Any, task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True,
        origin: str = "",
    ) -> AsyncRun[Any]:  # fmt: skip
        """`start`, for code on an event loop."""
        return await self.aio.start(agent, task, run_id=run_id, history=history, stream=stream, origin=origin)

    def get(self, run_id: str) -> Run[Any]:
        """A handle to a run; whether it exists shows when it is used."""
        return Run(self.aio.get(run_id))

    @waits("mesh")
    def runs(self, *, limit: int = 50) -> list[RunHead]:
        """The newest root runs."""
        return _run_here(self.aio.runs(limit=limit))

    @waits("mesh")
    def check(self) -> None:
        """Nothing: there are no servers."""

    def worker(self, *, queues: Sequence[str] = (), concurrency: int = 0) -> AbstractContextManager[None]:
        """Nothing, for a while: runs need no worker here."""
        return nullcontext()

    @waits("mesh")
    def close(self) -> None:
        """Let go of the threads that `def` tools run in."""
        _run_here(self.aio.close())


def _run_here(coro: Coroutine[Any, Any, T]) -> T:
    """In this thread, where a debugger expects it; in a notebook's cell, whose kernel has a loop in it, on another."""
    return run_sync(coro) if asyncio._get_running_loop() is not None else asyncio.run(coro)
