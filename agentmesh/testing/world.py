"""A mesh without servers: the real engine over the memory journal, in this thread, with a clock that skips ahead."""

import asyncio
import itertools
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from agentmesh.agent import Agent
from agentmesh.crew import Crew
from agentmesh.doing import Doer
from agentmesh.engine import Engine
from agentmesh.errors import RunError
from agentmesh.journals.memory import MemoryJournal
from agentmesh.message import Message
from agentmesh.models.scripted import ScriptedModel
from agentmesh.ports import GatherPlan, Member, Model, Refused, RunSpec, Sent, Wire
from agentmesh.run import Client, Run

Out = TypeVar("Out")


class PlainDispatch:
    """Messages that say only what they are for; one queue."""

    def steps(self, run_id: str, members: Sequence[Member], gather: GatherPlan | None, queue: str) -> list[Wire]:
        """See ports.Dispatch."""
        return [
            self._wire(f"a|{run_id}/{m.n}" if m.kind == "Delegate" else f"s|{run_id}|{m.n}|{m.kind}") for m in members
        ]

    def advance(self, run_id: str, agent: str, queue: str) -> Wire:
        """See ports.Dispatch."""
        return self._wire(f"a|{run_id}")

    def finish(self, run_id: str, agent: str, queue: str) -> Wire:
        """See ports.Dispatch."""
        return self._wire(f"f|{run_id}")

    def _wire(self, unit: str) -> Wire:
        return Wire("plain", f"{unit}#", "")


class FakeMesh:
    """Runs agents to where nothing more can happen, at once: for tests of crews.

    Time is the journal's own and skips ahead to the next timer; nothing waits.

    Args:
        model: replies in order (`says`, `uses`), a function of the Prompt, or a Model; serves every agent.
        workers: how many engines share the work, each with a cache of its own.
    """

    def __init__(
        self, agent: Agent[Any] | Crew, *, model: Any = (), workers: int = 1, start_ms: int = 1_000_000
    ) -> None:
        self.crew = agent if isinstance(agent, Crew) else Crew(agent)
        self.model: Model = model if hasattr(model, "ask") else ScriptedModel(model)
        self.now_ms = start_ms
        self.messages: deque[str] = deque()
        self.hold_messages = False  # True: nothing is worked off until it is False again
        self.journal = MemoryJournal(clock=lambda: self.now_ms, send=self._sent)
        self._ids = itertools.count(1)
        doer = Doer(
            model_of=lambda name: (self.model, str(name)), model=self.crew.model, deps=self.crew.deps, threads=4
        )
        self.engines = [
            Engine(crew=self.crew, journal=self.journal, dispatch=PlainDispatch(), doer=doer, worker=f"w{i}")
            for i in range(workers)
        ]
        self._turn = itertools.cycle(self.engines)
        self.client = Client(
            crew=self.crew, journal=self.journal, drive=self._drive, moved=self.settle, dispatch=PlainDispatch()
        )

    def start(
        self,
        agent_or_task: Agent[Any] | Any,
        task: Any = None,
        *,
        id: str = "",
        history: Sequence[Message] = (),
        stream: bool = True,
    ) -> Run[Any]:
        """Begin a run and go on until it ends or waits for somebody."""
        agent, task = (agent_or_task, task) if isinstance(agent_or_task, Agent) else (self.crew.lead, agent_or_task)
        run_id = id or f"r{next(self._ids)}"
        self._drive(self._begin(self.spec(agent, task, run_id, history=history, stream=stream)))
        return Run(run_id, self.client)

    def spec(
        self, agent: Agent[Any], task: Any, run_id: str, *, history: Sequence[Message] = (), stream: bool = True
    ) -> RunSpec:
        """What a run of this agent is begun with."""
        return RunSpec(
            run_id, self.crew.name, self.crew.version, agent.name, agent.task_json(task), agent.fields_json(),
            [m.to_json() for m in history], limits=self.crew.limits.to_json(),
            wire=PlainDispatch().advance(run_id, agent.name, ""), stream=stream,
        )  # fmt: skip

    def run(self, agent_or_task: Agent[Any] | Any, task: Any = None, **options: Any) -> Any:
        """`start` and its result.

        Raises:
            TimeoutError: the run waits for somebody.
        """
        return self.start(agent_or_task, task, **options).result(timeout_s=0)

    async def _begin(self, spec: RunSpec) -> None:
        answer = await self.engines[0].begin(spec)
        if isinstance(answer, Refused):
            raise RunError(f"run {spec.id!r} exists with another task", run_id=spec.id)
        await self.settle()

    async def settle(self) -> None:
        """Work off every message; then let time skip to the next timer, until nothing is left to happen."""
        while not self.hold_messages:
            while self.messages:
                await self.pump_once()
            due = self.journal.tables.zsets["due"]
            cancelled = self.journal.tables.sets["cancelled"]
            if not due and not cancelled:
                return
            if due and not cancelled:
                self.now_ms = max(self.now_ms, min(due.values()))
            if not await self.journal.sweep("sweeper"):
                self.now_ms += 1_000  # another sweeper's turn, or a lease that must run out first

    async def pump_once(self) -> None:
        """Work off the messages that are there now, side by side."""
        await asyncio.gather(*[self._work(self.messages.popleft()) for _ in range(len(self.messages))])

    async def _work(self, unit: str) -> None:
        letter, run_id, *rest = unit.split("|")
        engine = next(self._turn)
        if letter == "s":
            await engine.step(run_id, int(rest[0]), rest[1], self.crew.queue)
        elif letter == "a":
            await engine.advance(run_id)

    def _sent(self, sent: Sent) -> None:
        self.messages.append(sent.body.partition("#")[0])

    def _drive(self, coro: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(coro)
