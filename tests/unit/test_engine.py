"""Flows, gathers, tools, output types and limits through the real engine on a FakeMesh."""

import asyncio
import threading
from typing import Any

import pytest
from pydantic import BaseModel, Field

from agentmesh import (
    Agent,
    ApprovalDenied,
    Context,
    Crew,
    LimitReached,
    Limits,
    MeshError,
    OutputInvalid,
    QuorumMissed,
    RunError,
    RunFailed,
    Sleep,
    StepError,
    StepTimeout,
    ToolContext,
    ToolError,
    TryAgain,
    run,
    tool,
)
from agentmesh.event import StepDone, StepPlanned, StepRetried
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
    mesh.hold_messages = True
    handle = mesh.start("x")
    mesh.hold_messages = False
    asyncio.run(mesh.pump_once())
    asked[0] = "two"
    mesh.engines[0]._tails.drop(handle.id)
    asyncio.run(mesh.settle())
    (item,) = handle.waiting_for
    assert "step 1 was `Delegate 'Echo'` when first run and is now `Delegate 'Echo'`" in item.why
    with pytest.raises(RunError, match="is held as a whole .* only `retry` can be said of it"):
        handle.resolve(item, "failed")
    asked[0] = "one"  # the code is mended
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


# ---- gathers -----------------------------------------------------------------------------------
def gathering(**how: Any) -> type[Agent[Any]]:
    @tool
    def even(x: int) -> int:
        """Only even ones."""
        if x % 2:
            raise ValueError(f"{x} is odd")
        return x

    class G(Agent[Any]):
        def flow(self, task: list[int], ctx: Context) -> Any:
            got = ctx.gather([even.on(x) for x in task], **how)
            return [f"{type(g).__name__}" if isinstance(g, StepError) else g for g in got]

    return G


def test_gather_gives_values_in_the_order_asked() -> None:
    assert FakeMesh(gathering()()).run([4, 2, 6]) == [4, 2, 6]
    assert FakeMesh(gathering()()).run([]) == []
    assert FakeMesh(gathering()()).run([8]) == [8]


def test_gather_raises_the_first_error() -> None:
    with pytest.raises(RunFailed, match="3 is odd"):
        FakeMesh(gathering()()).run([2, 3, 4])


def test_gather_with_errors_waits_for_all() -> None:
    assert FakeMesh(gathering(errors=True)()).run([1, 2, 3]) == ["ToolError", 2, "ToolError"]
    assert FakeMesh(gathering(errors=True)()).run([1]) == ["ToolError"]


def test_gather_with_need() -> None:
    assert FakeMesh(gathering(need=0.5)()).run([1, 2, 3, 4]) == [2, 4]
    with pytest.raises(RunFailed, match="1 of 3 members succeeded, 2 were needed"):
        FakeMesh(gathering(need=2)()).run([1, 2, 3])
    with pytest.raises(RunFailed, match=r"gather\(need=4\) of 3 steps"):
        FakeMesh(gathering(need=4)()).run([1, 2, 3])


def test_gather_with_a_deadline_keeps_what_is_there() -> None:
    class Late(Agent[int]):
        def flow(self, task: int, ctx: Context) -> int:
            ctx.do(Sleep(task))
            return task

    class Lead(Agent[list[int]]):
        def flow(self, task: list[int], ctx: Context) -> list[int]:
            return ctx.gather([Late().on(s) for s in task], deadline_s=10)

    assert FakeMesh(Crew(Lead(), Late())).run([1, 5, 600]) == [1, 5]
    with pytest.raises(RunFailed, match="before the deadline"):
        FakeMesh(Crew(Lead(), Late())).run([60, 600])


def test_a_window_bounds_what_is_in_flight() -> None:
    most = [0, 0]

    @tool
    async def slow(x: int) -> int:
        """Counts how many run at once."""
        most[0] += 1
        most[1] = max(most)
        await asyncio.sleep(0.001)
        most[0] -= 1
        return x

    class W(Agent[list[int]]):
        def flow(self, task: str, ctx: Context) -> list[int]:
            return ctx.gather([slow.on(i) for i in range(9)], window=2)

    assert FakeMesh(W()).run("x") == list(range(9))
    assert most[1] <= 2


# ---- tools -------------------------------------------------------------------------------------
def test_try_again_goes_to_the_model() -> None:
    @tool
    def city(name: str) -> str:
        """Finds a city."""
        if name == "Lima":
            raise TryAgain("no city 'Lima'; add the country")
        return name

    class Guide(Agent):
        tools = (city,)

    mesh = FakeMesh(Guide(), model=[uses("city", name="Lima"), uses("city", name="Lima, Peru"), says("found")])
    handle = mesh.start("x")
    assert handle.result() == "found"
    assert [m.text for m in handle.messages if m.role == "tool"] == ["no city 'Lima'; add the country", "Lima, Peru"]


def test_what_a_model_calls_wrongly_is_said_to_it_without_a_step() -> None:
    class A(Agent):
        tools = (add,)

    mesh = FakeMesh(A(), model=[uses("plus", a=1), uses("add", a="x", b=2), says("sorry")])
    handle = mesh.start("x")
    assert handle.result() == "sorry"
    told = [m.text for m in handle.messages if m.role == "tool"]
    assert told[0] == "error: there is no tool 'plus'; there are: add"
    assert told[1].startswith("error: a: Input should be a valid integer")
    assert [e.kind for e in handle.events() if isinstance(e, StepPlanned)] == ["Ask", "Ask", "Ask"]


def test_a_team_member_is_a_tool() -> None:
    class Lead(Agent):
        team = (Echo(),)

    def model(prompt: Any) -> Any:
        if not prompt.tools:
            return says("echo: " + prompt.messages[-1].text)
        last = prompt.messages[-1]
        return says(last.text) if last.role == "tool" else uses("Echo", task="hello")

    assert FakeMesh(Lead(), model=model).run("x") == "echo: hello"


def test_a_denied_call_is_told_to_the_model() -> None:
    @tool(approve=True)
    def refund(order: int) -> str:
        """Refunds."""
        return "done"

    class Desk(Agent):
        tools = (refund,)

    mesh = FakeMesh(Desk(), model=[uses("refund", order=7), says("it was not allowed")])
    handle = mesh.start("refund 7")
    (item,) = handle.waiting_for
    assert (item.tool, item.args) == ("refund", {"order": 7})
    handle.deny(item, by="ana", reason="too late")
    assert handle.result() == "it was not allowed"
    assert "refund was denied by ana: too late" in handle.messages[2].text
    assert issubclass(ApprovalDenied, StepError)


def test_a_tool_knows_its_key_attempt_and_deps() -> None:
    seen = []

    @tool(retries=1)
    def once(c: ToolContext = ToolContext()) -> str:
        """Looks around."""
        seen.append((c.key, c.attempt, c.run_id, c.deps, c.cancelled))
        c.progress("looking")
        if c.attempt == 1:
            raise OSError("again")
        return "ok"

    class A(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(once.on())

    mesh = FakeMesh(Crew(A(), deps={"db": 1}))
    handle = mesh.start("x", id="k1")
    assert handle.result() == "ok"
    assert seen == [("k1/1", 1, "k1", {"db": 1}, False), ("k1/1", 2, "k1", {"db": 1}, False)]
    assert [type(e) for e in handle.events()][2:4] == [StepRetried, StepDone]


def test_a_context_needs_no_default_and_async_tools_run_on_the_loop() -> None:
    threads: list[threading.Thread] = []

    @tool
    async def keyed(word: str, c: ToolContext) -> str:
        threads.append(threading.current_thread())
        return f"{word} {c.key}"

    class Flow(Agent):
        tools = (keyed,)

        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(keyed.on(task))  # type: ignore[call-arg]  # the engine gives the context

    assert FakeMesh(Flow()).run("tea") == "tea r1/1"
    assert threads == [threading.current_thread()]


def test_output_that_is_too_long_keeps_head_and_tail() -> None:
    @tool(max_output_bytes=1000)
    def big() -> str:
        """Much."""
        return "a" * 5_000_000 + "end"

    @tool(max_output_bytes=1000)
    def wide() -> list[int]:
        """Much more."""
        return list(range(10_000))

    class A(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(big.on() if task == "text" else wide.on())

    text = FakeMesh(A()).run("text")
    assert len(text) < 1100
    assert text.endswith("end")
    assert "bytes left out" in text
    with pytest.raises(RunFailed, match="returned 48891 bytes of JSON and max_output_bytes is 1000"):
        FakeMesh(A()).run("list")


def test_tools_that_fail_fail_the_step_with_a_sentence() -> None:
    @tool
    def objects() -> Any:
        """No JSON."""
        return object()

    @tool(timeout_s=0.01)
    async def slow() -> str:
        """Too slow."""
        await asyncio.sleep(5)
        return ""

    class A(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            try:
                ctx.do(objects.on() if task == "json" else slow.on())
            except ToolError as e:
                return f"{e.n} {e.attempts} {e.message}"
            except StepTimeout as e:
                return e.message
            return "no error"

    assert "tool `objects` returned <object object" in FakeMesh(A()).run("json")
    assert FakeMesh(A()).run("slow") == "tool `slow` took longer than 0.01 s"


def test_run_inside_a_flow_or_a_tool_is_refused() -> None:
    @tool
    def nested() -> str:
        """Tries to wait."""
        return run(Echo(), "x")

    class A(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return run(Echo(), "x") if task == "flow" else ctx.do(nested.on())

    with pytest.raises(RunFailed, match=r"`run\(\)` inside the flow of `A` would hold a worker .* write `ctx.do"):
        FakeMesh(A()).run("flow")
    with pytest.raises(RunFailed, match=r"`run\(\)` inside tool `nested` would hold a worker"):
        FakeMesh(A()).run("tool")
    assert issubclass(RunFailed, MeshError)


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
    assert "Answer again" in handle.messages[2].text
    with pytest.raises(RunFailed, match="the answer of `Critic` is not a Verdict: why: Field required") as e:
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

    with pytest.raises(RunFailed, match="5 agents deep, and the limit is 4"):
        FakeMesh(Crew(Loop(), limits=Limits(depth=4))).run("x")


class Chatty(Agent):
    tools = (add,)


def test_a_limit_holds_the_run_until_it_is_raised() -> None:
    crew = Crew(Chatty(), limits=Limits(turns=2))
    mesh = FakeMesh(crew, model=[uses("add", a=1, b=1), uses("add", a=2, b=2), says("4")])
    handle = mesh.start("x")
    (item,) = handle.waiting_for
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
    assert mesh.start("a", id="same").result() == mesh.start("a", id="same").result() == "a"
    with pytest.raises(MeshError, match="exists with another task"):
        mesh.start("b", id="same")


def test_quorum_missed_carries_its_errors_through_the_journal() -> None:
    class Asker(Agent[Any]):
        def flow(self, task: list[int], ctx: Context) -> Any:
            try:
                return ctx.gather([bad.on(x) for x in task], need=2)
            except QuorumMissed as e:
                return [x.message for x in e.errors or []]

    @tool
    def bad(x: int) -> int:
        """Fails."""
        raise ValueError(str(x))

    assert FakeMesh(Asker()).run([1, 2, 3]) == ["tool `bad` raised ValueError: 1", "tool `bad` raised ValueError: 2"]
