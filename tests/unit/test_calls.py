"""Tools and team members as a model calls them, through the real engine on a FakeMesh."""

import asyncio
import threading
from typing import Any

import pytest

from agentmesh import (
    Agent,
    ApprovalDenied,
    Context,
    Crew,
    MeshError,
    RunFailedError,
    StepError,
    StepTimeout,
    ToolContext,
    ToolError,
    TryAgain,
    run,
    tool,
)
from agentmesh.journal.events import StepDone, StepPlanned, StepRetried
from agentmesh.model import Answer, Model, Prompt
from agentmesh.testing import FakeMesh, Reply, says, uses


class Echo(Agent):
    """Says what it is told."""


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


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
    assert [m.text for m in handle.messages() if m.role == "tool"] == ["no city 'Lima'; add the country", "Lima, Peru"]


def test_what_a_model_calls_wrongly_is_said_to_it_without_a_step() -> None:
    class A(Agent):
        tools = (add,)

    mesh = FakeMesh(A(), model=[uses("plus", a=1), uses("add", a="x", b=2), says("sorry")])
    handle = mesh.start("x")
    assert handle.result() == "sorry"
    told = [m.text for m in handle.messages() if m.role == "tool"]
    assert told[0] == "error: unknown tool 'plus'; use one of: add"
    assert told[1].startswith("error: a: Input should be a valid integer")
    assert [e.kind for e in handle.events() if isinstance(e, StepPlanned)] == ["Ask", "Ask", "Ask"]


def test_arguments_nested_too_deeply_are_the_models_own_mistake() -> None:
    @tool
    def keep(value: list[Any]) -> int:
        return len(value)

    class A(Agent):
        tools = (keep,)
        team = (Echo(),)

    calls = Reply("", tuple((name, '{"value": ' + "[" * 100_000) for name in ("keep", "Echo")))
    handle = FakeMesh(A(), model=[calls, says("sorry")]).start("x")
    assert handle.result() == "sorry"
    told = [m.text for m in handle.messages() if m.role == "tool"]
    assert told[0] == "error: the arguments are nested too deeply; call keep again"
    assert told[1].startswith("error: ")
    assert told[1].endswith("; call Echo again")


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
    (item,) = handle.waiting_for()
    assert (item.name, item.args) == ("refund", {"order": 7})
    handle.deny(item, by="ana", reason="too late")
    assert handle.result() == "it was not allowed"
    assert "refund was denied by ana: too late" in handle.messages()[2].text
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
    handle = mesh.start("x", run_id="k1")
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
    assert "bytes omitted" in text
    with pytest.raises(RunFailedError, match="returned 48891 bytes of JSON and max_output_bytes is 1000"):
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
    assert FakeMesh(A()).run("slow") == "tool `slow` timed out after 0.01 s"


def test_run_inside_a_flow_or_a_tool_is_refused() -> None:
    @tool
    def nested() -> str:
        """Tries to wait."""
        return run(Echo(), "x")

    class A(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return run(Echo(), "x") if task == "flow" else ctx.do(nested.on())

    with pytest.raises(RunFailedError, match=r"`run\(\)` inside the flow of `A` would block a worker .* write `ctx.do"):
        FakeMesh(A()).run("flow")
    with pytest.raises(RunFailedError, match=r"`run\(\)` inside tool `nested` would block a worker"):
        FakeMesh(A()).run("tool")
    assert issubclass(RunFailedError, MeshError)


@pytest.mark.parametrize("answer", ["text", None])
def test_a_model_that_gives_no_answer(answer: Any) -> None:
    class Odd(Model):
        async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
            return answer  # type: ignore[no-any-return]  # the mistake

    class A(Agent):
        retries = 0

    with pytest.raises(RunFailedError, match="the model of `A` raised TypeError: its `ask` gives a .*, not an Answer"):
        FakeMesh(A(), model=Odd()).run("x")


def test_a_timeout_of_a_tool_or_a_model_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the step's `timeout_s` is a StepTimeout; what code inside raises keeps its name."""

    @tool(timeout_s=5)
    async def slow() -> str:
        """Waits for a server."""
        raise TimeoutError("the server did not answer")

    class Caller(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(slow.on())

    with pytest.raises(RunFailedError, match="tool `slow` raised TimeoutError: the server did not answer"):
        FakeMesh(Caller()).run("x")

    class Impatient(Model):
        async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
            raise TimeoutError("no answer in 3 s")

    class Asker(Agent):
        retries = 0

    with pytest.raises(RunFailedError, match="the model of `Asker` raised TimeoutError: no answer in 3 s"):
        FakeMesh(Asker(), model=Impatient()).run("x")
