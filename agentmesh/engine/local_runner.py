"""Runs in this process without servers: the real engine over the memory journal, until nothing is left to do.

Time is the journal's own and skips ahead to the next timer; nothing waits.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence

from agentmesh.definitions.crew import Crew
from agentmesh.engine.dispatch import MessageSpec
from agentmesh.engine.engine import Engine
from agentmesh.engine.executor import StepExecutor
from agentmesh.engine.replay import History
from agentmesh.journal.events import Event
from agentmesh.journal.memory import MemoryJournal
from agentmesh.journal.types import Accepted, GatherPlan, NewRun, OutboxMessage, Refused, TaskMessage


class LocalDispatch:
    """Messages that name only their unit, in one queue."""

    def steps(
        self, run_id: str, members: Sequence[MessageSpec], gather: GatherPlan | None, queue: str
    ) -> list[TaskMessage]:
        """See Dispatch."""
        return [self._wire(f"a|{run_id}/{m.n}" if m.lane == "child" else f"s|{run_id}|{m.n}") for m in members]

    def advance(self, run_id: str, agent: str, queue: str) -> TaskMessage:
        """See Dispatch."""
        return self._wire(f"a|{run_id}")

    def finish(self, run_id: str, agent: str, queue: str) -> TaskMessage:
        """See Dispatch."""
        return self._wire(f"f|{run_id}")

    def _wire(self, unit: str) -> TaskMessage:
        return TaskMessage("plain", f"{unit}#", "")


class LocalRunner:
    """A journal, the messages that it sends, and the engines that consume them.

    Args:
        workers: how many engines share the work, each with a cache of its own.
        on_run_end: called with each run that ends.
    """

    def __init__(
        self, crew: Crew, executor: StepExecutor, *, start_ms: int, workers: int = 1,
        on_run_end: Callable[[History, Event], None] | None = None,
    ) -> None:  # fmt: skip
        self.crew, self.now_ms = crew, start_ms
        self.dispatch = LocalDispatch()
        self.messages: deque[str] = deque()
        self.paused = False  # True: no message is consumed
        self.journal = MemoryJournal(clock=lambda: self.now_ms, send=self._sent)
        self.engines = [
            Engine(
                crew=crew, journal=self.journal, dispatch=self.dispatch, executor=executor, worker=f"w{i}", on_run_end=on_run_end
            )
            for i in range(workers)
        ]  # fmt: skip
        self._turn = itertools.cycle(self.engines)

    async def begin(self, new: NewRun) -> Accepted | Refused:
        """Begin a run and go on until it ends or waits for a decision."""
        answer = await self.engines[0].begin(new)
        if not isinstance(answer, Refused):
            await self.run_until_idle()
        return answer

    async def run_until_idle(self) -> None:
        """Consume every message, then skip to the time of the next timer, until nothing is left to happen."""
        while not self.paused:
            while self.messages:
                await self.process_messages()
            due = self.journal.tables.zsets["due"]
            cancelled = self.journal.tables.sets["cancelled"]
            if not due and not cancelled:
                return
            if due and not cancelled:
                self.now_ms = max(self.now_ms, min(due.values()))
            if not (await self.journal.sweep("sweeper")).count:
                self.now_ms += 1_000  # another sweeper's turn, or a lease that must expire first

    async def process_messages(self) -> None:
        """Consume the messages that are there now, concurrently."""
        await asyncio.gather(*[self._work(self.messages.popleft()) for _ in range(len(self.messages))])

    async def _work(self, unit: str) -> None:
        letter, run_id, *rest = unit.split("|")
        engine = next(self._turn)
        if letter == "s":
            await engine.step(run_id, int(rest[0]), self.crew.queue)
        elif letter == "a":
            await engine.advance(run_id)

    def _sent(self, sent: OutboxMessage) -> None:
        self.messages.append(sent.body.partition("#")[0])
