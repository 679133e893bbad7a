"""A mesh without servers: the real engine over the memory journal, in this thread, with a clock that skips ahead."""

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.engine.executor import LocalExecutor
from agentmesh.engine.local_runner import LocalDispatch, LocalRunner
from agentmesh.engine.run import Run, RunClient
from agentmesh.errors import RunError
from agentmesh.journal.types import Refused, RunSpec
from agentmesh.message import Message
from agentmesh.model import Model
from agentmesh.testing.scripted import ScriptedModel

Out = TypeVar("Out")


class FakeMesh(LocalRunner):
    """Runs agents to where nothing more can happen, at once: for tests of crews.

    Time is the journal's own and skips ahead to the next timer; nothing waits.

    Args:
        model: replies in order (`says`, `uses`), a function of the Prompt, or a Model; serves every agent.
        workers: how many engines share the work, each with a cache of its own.
    """

    def __init__(
        self, agent: Agent[Any, Any] | Crew, *, model: Any = (), workers: int = 1, start_ms: int = 1_000_000
    ) -> None:
        crew = agent if isinstance(agent, Crew) else Crew(agent)
        self.model: Model = model if hasattr(model, "ask") else ScriptedModel(model)
        doer = LocalExecutor(
            model_of=lambda name: (self.model, str(name)), servers_of=crew.queues.servers_of, model=crew.model, deps=crew.deps,
            threads=4,
        )  # fmt: skip
        super().__init__(crew, doer, start_ms=start_ms, workers=workers)
        self._ids = itertools.count(1)
        self.client = RunClient(
            crew=self.crew,
            journal=self.journal,
            run_sync=self._run_sync,
            on_change=self.run_until_idle,
            dispatch=LocalDispatch(),
        )

    def start(
        self,
        agent_or_task: Agent[Any, Any] | Any,
        task: Any = None,
        *,
        id: str = "",
        history: Sequence[Message] = (),
        stream: bool = True,
    ) -> Run[Any]:
        """Begin a run and go on until it ends or is waiting for a decision."""
        agent, task = (agent_or_task, task) if isinstance(agent_or_task, Agent) else (self.crew.lead, agent_or_task)
        run_id = id or f"r{next(self._ids)}"
        self._run_sync(self._begin(self.spec(agent, task, run_id, history=history, stream=stream)))
        return Run(run_id, self.client)

    def spec(
        self, agent: Agent[Any, Any], task: Any, run_id: str, *, history: Sequence[Message] = (), stream: bool = True
    ) -> RunSpec:
        """What a run of this agent is begun with."""
        return RunSpec(
            run_id, self.crew.name, self.crew.version, agent.name, agent._task_json(task), agent._fields_json(),
            [m.to_json() for m in history], limits=self.crew.limits.to_json(),
            wire=LocalDispatch().advance(run_id, agent.name, ""), stream=stream,
        )  # fmt: skip

    def run(self, agent_or_task: Agent[Any, Any] | Any, task: Any = None, **options: Any) -> Any:
        """`start` and its result.

        Raises:
            TimeoutError: the run is waiting for a decision.
        """
        return self.start(agent_or_task, task, **options).result(timeout_s=0)

    async def _begin(self, spec: RunSpec) -> None:
        if isinstance(await self.begin(spec), Refused):
            raise RunError(f"run {spec.id!r} exists with another task", run_id=spec.id)

    def _run_sync(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(coro)
