"""A worker does not fetch events that it has cached, also where the next message overtakes the commit's reply."""

import asyncio
from typing import Any

import pytest

from agentmesh import tool
from agentmesh.definitions.agent import Agent
from agentmesh.definitions.context import Context
from agentmesh.engine import history_cache
from agentmesh.testing import FakeMesh


@tool
def nothing(number: int) -> int:
    """Does nothing."""
    return number


class Two(Agent[int]):
    """Two steps, one after the other."""

    def flow(self, task: str, ctx: Context) -> int:
        return ctx.do(nothing.on(1)) + ctx.do(nothing.on(2))


class Late:
    """The journal; what a commit answers comes when it is let through."""

    def __init__(self, journal: Any) -> None:
        self._journal, self.versions = journal, list[int]()
        self.wrote, self.answers = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._journal, name)

    async def claim(self, *args: Any, **kwargs: Any) -> Any:
        self.versions.append(kwargs["version"])
        return await self._journal.claim(*args, **kwargs)

    async def commit(self, *args: Any, **kwargs: Any) -> Any:
        answer = await self._journal.commit(*args, **kwargs)
        self.wrote.set()
        await self.answers.wait()
        return answer


def test_a_message_that_overtakes_its_commit_s_answer_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_cache, "WRITE_WAIT_S", 60)

    async def both() -> None:
        first = asyncio.create_task(engine.step(run.run_id, 1, "main"))
        await late.wrote.wait()
        second = asyncio.create_task(engine.step(run.run_id, 2, "main"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert late.versions == [0]
        late.answers.set()
        assert await first == await second == "StepDone"
        assert late.versions == [0, 4]  # started, planned, done, planned

    run, engine, late = _begun()
    asyncio.run(both())
    assert run.result() == 3


def test_an_answer_that_does_not_come_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_cache, "WRITE_WAIT_S", 0.01)

    async def both() -> None:
        first = asyncio.create_task(engine.step(run.run_id, 1, "main"))
        await late.wrote.wait()
        late.wrote.clear()
        second = asyncio.create_task(engine.step(run.run_id, 2, "main"))
        await late.wrote.wait()  # it has read the run anew, and committed
        assert late.versions == [0, 0]
        late.answers.set()
        assert await first == await second == "StepDone"

    run, engine, late = _begun()
    asyncio.run(both())
    assert run.result() == 3


def _begun() -> tuple[Any, Any, Any]:
    mesh = FakeMesh(Two())
    mesh.runner.paused = True
    run = mesh.start("x")
    mesh.runner.paused = False
    engine: Any = mesh.runner.engines[0]
    engine.journal = Late(engine.journal)
    return run, engine, engine.journal


@tool
def kind(value: Any) -> str:
    """Says what it was given."""
    return type(value).__name__


def test_calls_that_are_alike_are_kept_apart_by_type() -> None:
    told = [kind.on(v).arguments["value"] for v in (1, 1.0, True, "1", None)]
    assert [type(v) for v in told] == [int, float, bool, str, type(None)]
    assert kind.on(value=1) is kind.on(value=1)  # a replay asks again
    assert kind.on("x" * 1000) is not kind.on("x" * 1000)
