"""Flows, output types, declarations and limits through the real engine on a FakeMesh."""

import asyncio
from typing import Any

import pytest
from pydantic import BaseModel, Field

from agentmesh import (
    Agent,
    Context,
    Crew,
    LimitReached,
    Limits,
    MeshError,
    OutputInvalid,
    RunError,
    RunFailedError,
    Sleep,
    tool,
)
from agentmesh.message import user
from agentmesh.testing import FakeMesh, says, uses


class Echo(Agent):
    """Says what it is told."""


def echo(prompt: Any) -> Any:
    return says(prompt.messages[-1].text)


# ---- replay ------------------------------------------------------------------------------------
def test_a_flow_that_swallows_everything_still_waits() -> None:
    class Stubborn(Agent[list[str]]):
        def flow(self, task: str, ctx: Context) -> list[str]:
            said = []
            for word in ("a", "b"):
                try:
                    said.append(ctx.do(Echo().on(word)))
                except BaseException:  # noqa: BLE001
                    said.append("swallowed")
            return said

    mesh = FakeMesh(Crew(Stubborn(), Echo()), model=echo)
    assert mesh.run("x") == ["a", "b"]


def test_a_flow_that_asks_for_another_step_is_held_with_the_step_named() -> None:
    asked = ["one"]

    class Fickle(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            first = ctx.do(Echo().on(asked[0]))
            ctx.do(Sleep(5))
            return first

    mesh = FakeMesh(Crew(Fickle(), Echo()), model=echo)
    mesh.runner.paused = True
    handle = mesh.start("x")
    mesh.runner.paused = False
    asyncio.run(mesh.runner.process_messages())
    asked[0] = "two"
    mesh.runner.engines[0]._history_cache.drop(handle.run_id)
    asyncio.run(mesh.runner.run_until_idle())
    (item,) = handle.waiting_for()
    assert "step 1 was `Delegate 'Echo'` when first run and is now `Delegate 'Echo'`" in item.why
    with pytest.raises(RunError, match="is blocked as a whole .* only `retry` resolves it"):
        handle.resolve(item, "failed")
    asked[0] = "one"  # the code is fixed
    handle.revive(item)
    assert handle.result() == "one"


def test_the_clock_of_a_run_is_its_beginning() -> None:
    class Clock(Agent[list[float]]):
        def flow(self, task: str, ctx: Context) -> list[float]:
            early = ctx.started_at
            ctx.do(Sleep(60))
            return [early, ctx.started_at]

    assert FakeMesh(Clock(), start_ms=5_000).run("x") == [5.0, 5.0]


def test_long_runs_are_replayed_from_other_workers_too() -> None:
    class Counter(Agent[int]):
        def flow(self, task: str, ctx: Context) -> int:
            return sum(ctx.do(add.on(i, 1)) for i in range(60))

    assert FakeMesh(Counter(), workers=3).run("x") == sum(range(60)) + 60


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


# ---- output ------------------------------------------------------------------------------------
class Verdict(BaseModel):
    good: bool
    why: str = Field(description="one sentence")


class Critic(Agent[Verdict]):
    """Judges."""


def test_structured_output_and_its_one_correcting_turn() -> None:
    mesh = FakeMesh(Critic(), model=[says("well"), says('```json\n{"good": true, "why": "short"}\n```')])
    handle = mesh.start("x")
    assert handle.result() == Verdict(good=True, why="short")
    assert "Answer again" in handle.messages()[2].text
    with pytest.raises(RunFailedError, match="the answer of `Critic` is not a Verdict: why: Field required") as e:
        FakeMesh(Critic(), model=[says("{}"), says('{"good": true}')]).run("x")
    assert e.value.cause == OutputInvalid.__name__


def test_a_list_is_wrapped_for_the_model() -> None:
    class Planner(Agent[list[str]]):
        pass

    mesh = FakeMesh(Planner(), model=[says({"value": ["a", "b"]})])
    assert mesh.run("x") == ["a", "b"]


# ---- declarations at work ----------------------------------------------------------------------
def test_typed_fields_travel_with_a_delegate() -> None:
    class Critter(Agent):
        tone: str = "dry"

        def flow(self, task: str, ctx: Context) -> str:
            return f"{task} in a {self.tone} tone"

    class Lead(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(Critter(tone="warm").on(task))

    assert FakeMesh(Crew(Lead(), Critter())).run("hi") == "hi in a warm tone"


def test_history_goes_before_the_task() -> None:
    mesh = FakeMesh(Echo(), model=lambda p: says(str(len(p.messages))))
    assert mesh.start("x", history=[user("a"), user("b")]).result() == "3"


def test_an_agent_that_calls_itself_without_end_is_stopped_by_depth() -> None:
    class Loop(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(Loop().on(task))

    with pytest.raises(RunFailedError, match="5 agents deep, and the limit is 4"):
        FakeMesh(Crew(Loop(), limits=Limits(depth=4))).run("x")


class Chatty(Agent):
    tools = (add,)


def test_a_limit_holds_the_run_until_it_is_raised() -> None:
    crew = Crew(Chatty(), limits=Limits(turns=2))
    mesh = FakeMesh(crew, model=[uses("add", a=1, b=1), uses("add", a=2, b=2), says("4")])
    handle = mesh.start("x")
    (item,) = handle.waiting_for()
    assert item.why == "limit:turns"
    handle.raise_limits({"turns": 10})
    assert handle.result() == "4"


def test_a_limit_fails_the_run_where_a_script_wants_that() -> None:
    crew = Crew(Chatty(), limits=Limits(turns=1, on_limit="fail"))
    with pytest.raises(LimitReached, match="reached its limit of turns") as e:
        FakeMesh(crew, model=[uses("add", a=1, b=1), says("2")]).run("x")
    assert e.value.limit == "turns"


def test_the_same_id_is_the_same_run() -> None:
    mesh = FakeMesh(Echo(), model=echo)
    assert mesh.start("a", run_id="same").result() == mesh.start("a", run_id="same").result() == "a"
    with pytest.raises(MeshError, match="exists with another task"):
        mesh.start("b", run_id="same")
