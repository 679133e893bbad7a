"""Scenarios with their whole journals, step by step."""

import asyncio
from typing import Any

from agentmesh import Agent, Approve, Context, Crew, DelegateFailed, Sleep, StepError, ToolContext, tool
from agentmesh.definitions.tool import NotDone, Unknown
from agentmesh.engine.run import Run
from agentmesh.journal.events import Approved, RunCancelled, StepResolved
from agentmesh.journal.types import Claimed
from agentmesh.message import Message
from agentmesh.model import Answer, Prompt
from agentmesh.testing import FakeMesh, says, uses


def story(run: Run[Any]) -> list[str]:
    """A journal in short: `StepPlanned 2 Call add`, `StepDone 2`, `GatherClosed 2 [2, 3] all`."""
    told = []
    for e in run.events():
        name = type(e).__name__
        if name == "StepPlanned":
            told.append(f"{name} {e.n} {e.kind} {e.name}")  # type: ignore[attr-defined]
        elif name == "GatherClosed":
            told.append(f"{name} {e.first} {e.members} {e.why}")  # type: ignore[attr-defined]
        else:
            told.append(f"{name} {n}" if (n := getattr(e, "n", 0)) else name)
    return told


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


class Echo(Agent):
    """Says something."""


def test_default_agent_with_parallel_tool_calls() -> None:
    class Adder(Agent):
        tools = (add,)

    mesh = FakeMesh(Adder(), model=[uses("add", a=1, b=2) & uses("add", a=3, b=4), says("3 and 7")])
    run = mesh.start("sums")
    assert run.result() == "3 and 7"
    assert story(run) == [
        "RunStarted", "StepPlanned 1 Ask Adder", "StepDone 1",
        "StepPlanned 2 Call add", "StepPlanned 3 Call add", "StepDone 2", "StepDone 3", "GatherClosed 2 [2, 3] all",
        "StepPlanned 4 Ask Adder", "StepDone 4", "RunDone",
    ]  # fmt: skip
    assert [m.role for m in run.messages()] == ["user", "assistant", "tool", "tool", "assistant"]


class Pair(Agent[list[str]]):
    def flow(self, task: str, ctx: Context) -> list[str]:
        return ctx.gather([Echo().on("a"), Echo().on("b")])


def test_a_member_dies_between_its_commit_and_the_body() -> None:
    """The last member's end is written with the body's entry; the body's message is lost, and the sweeper sends it again."""
    mesh = FakeMesh(Crew(Pair(), Echo()), model=lambda p: says(p.messages[-1].text.upper()))
    lose = iter([True])
    sent = mesh.runner.journal._send

    def lossy(message: Any) -> None:
        body = message.body.partition("#")[0]
        closed = any("GatherClosed" in line for line in mesh.runner.journal.tables.lists["ev:r1"])
        if body == "a|r1" and closed and next(lose, False):
            return
        sent(message)

    mesh.runner.journal._send = lossy
    run = mesh.start("x")
    assert run.status() == "open"
    assert story(run)[-1] == "GatherClosed 1 [1, 2] all"
    mesh.runner.now_ms += 3_000
    asyncio.run(mesh.runner.journal.sweep("s", empty=["plain"]))
    asyncio.run(mesh.runner.run_until_idle())
    assert run.result() == ["A", "B"]
    assert story(run).count("GatherClosed 1 [1, 2] all") == 1


class Tolerant(Agent[list[str]]):
    def flow(self, task: str, ctx: Context) -> list[str]:
        return ctx.gather([Echo().on(x) for x in ("quick", "quicker", "slow")], need=2, deadline_s=30)


def test_two_of_three_with_a_deadline_and_a_late_third() -> None:
    released = asyncio.Event()

    class Slow:
        async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
            if prompt.messages[-1].text == "slow":
                await released.wait()
            return Answer(Message("assistant", prompt.messages[-1].text))

    mesh = FakeMesh(Crew(Tolerant(), Echo()), model=Slow())

    async def scenario() -> Any:
        spec_run = asyncio.create_task(mesh.begin(Tolerant(), "x", run_id="t1"))
        while "RunDone" not in story_now():
            await asyncio.sleep(0)
            await mesh.runner.process_messages()
        released.set()
        await spec_run

    def story_now() -> str:
        return " ".join(mesh.runner.journal.tables.lists["ev:t1"])

    asyncio.run(scenario())
    run: Run[list[str]] = mesh.get("t1")
    assert run.result() == ["quick", "quicker"]
    assert "GatherClosed 1 [1, 2] need" in story(run)
    assert story(run)[-1] == "RunDone"
    assert mesh.runner.journal.tables.hashes["run:t1/3"]["status"] == "cancelled"


class Payer(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        ctx.do(Approve(f"pay {task}?"))
        return f"paid {task}"


class Office(Agent[list[str]]):
    def flow(self, task: str, ctx: Context) -> list[str]:
        return ctx.gather([Payer().on("1"), Payer().on("2")])


def test_approval_inside_a_gathered_sub_agent() -> None:
    mesh = FakeMesh(Crew(Office(), Payer()))
    run = mesh.start("x")
    first, second = run.waiting_for()
    assert [(i.run_id, i.n, i.args["question"]) for i in (first, second)] == [
        ("r1/1", 1, "pay 1?"),
        ("r1/2", 1, "pay 2?"),
    ]
    run.approve(second, by="ana")
    assert run.status() == "open"
    run.approve(first, by="bo")
    assert run.result() == ["paid 1", "paid 2"]
    assert story(run) == [
        "RunStarted", "StepPlanned 1 Delegate Payer", "StepPlanned 2 Delegate Payer", "StepDone 2", "StepDone 1",
        "GatherClosed 1 [2, 1] all", "RunDone",
    ]  # fmt: skip
    assert story(mesh.get("r1/2")) == ["RunStarted", "StepPlanned 1 Approve approve", "Approved 1", "RunDone"]


class Inner(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(Echo().on(task))


class Outer(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(Inner().on(task))


def test_cancel_of_the_root_while_a_grandchild_asks_a_model() -> None:
    begun, seen = asyncio.Event(), []

    class Hanging:
        async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
            begun.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                seen.append("stopped")
                raise
            raise AssertionError

    mesh = FakeMesh(Crew(Outer(), Inner(), Echo()), model=Hanging())

    async def scenario() -> None:
        running = asyncio.create_task(mesh.begin(Outer(), "x", run_id="c1"))
        await begun.wait()
        await mesh.runner.journal.signal("c1", RunCancelled(by="ana"))
        await mesh.runner.journal.sweep("s")
        (engine,) = mesh.runner.engines
        lost = await mesh.runner.journal.renew(engine.worker, engine.held_leases())
        for unit in lost:
            engine.lose_lease(unit)
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(scenario())
    assert seen == ["stopped"]
    for run_id in ("c1", "c1/1", "c1/1/1"):
        assert story(mesh.get(run_id))[-1] == "RunCancelled"


def once_crew(reconcile: Any = None) -> tuple[type[Agent], list[str]]:
    done: list[str] = []

    @tool(delivery="at_most_once", reconcile=reconcile)
    def pay(amount: int, c: ToolContext = ToolContext()) -> str:
        """Pays."""
        done.append(c.key)
        return f"paid {amount}"

    class Bank(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(pay.on(5))

    return Bank, done


def crash_inside_the_tool(mesh: FakeMesh) -> Run[str]:
    """Another worker takes the step and dies with it."""
    mesh.runner.paused = True
    run = mesh.start("x", run_id="p1")
    claim = mesh.runner.journal.claim(
        "s|p1|1", worker="dead", token="t", version=0, crew=mesh.crew.name, crew_version=""
    )
    assert isinstance(asyncio.run(claim), Claimed)
    mesh.runner.messages.clear()
    mesh.runner.paused = False
    asyncio.run(mesh.runner.journal.release("dead", crashed=True))
    asyncio.run(mesh.runner.run_until_idle())
    return run


def test_at_most_once_with_a_crash_waits_for_a_person() -> None:
    bank, done = once_crew()
    mesh = FakeMesh(bank())
    run = crash_inside_the_tool(mesh)
    (item,) = run.waiting_for()
    assert (item.why, item.n, done) == ("in_doubt", 1, [])
    run.resolve(item, "done", value="paid 5", by="ana")
    assert run.result() == "paid 5"
    assert story(run) == ["RunStarted", "StepPlanned 1 Call pay", "StepInDoubt 1", "StepResolved 1", "RunDone"]
    assert isinstance(run.events()[3], StepResolved)


def test_at_most_once_reconciled() -> None:
    for known, value, calls in (("paid 5", "paid 5", []), (NotDone, "paid 5", ["p1/1"])):
        bank, done = once_crew(lambda key, known=known: known)
        run = crash_inside_the_tool(FakeMesh(bank()))
        assert (run.result(), done) == (value, calls)
    bank, done = once_crew(lambda key: Unknown)
    run = crash_inside_the_tool(FakeMesh(bank()))
    assert ([i.why for i in run.waiting_for()], done) == (["in_doubt"], [])


def test_a_retry_with_back_off_inside_a_gather() -> None:
    tries: list[int] = []

    @tool(retries=2)
    def flaky(x: int, c: ToolContext = ToolContext()) -> int:
        """Fails once."""
        tries.append(c.attempt)
        if x == 1 and c.attempt == 1:
            raise OSError("not yet")
        return x

    class Both(Agent[list[int]]):
        def flow(self, task: str, ctx: Context) -> list[int]:
            return ctx.gather([flaky.on(1), flaky.on(2)])

    run = FakeMesh(Both()).start("x")
    assert run.result() == [1, 2]
    assert sorted(tries) == [1, 1, 2]
    assert story(run) == [
        "RunStarted", "StepPlanned 1 Call flaky", "StepPlanned 2 Call flaky", "StepRetried 1", "StepDone 2", "StepDone 1",
        "GatherClosed 1 [2, 1] all", "RunDone",
    ]  # fmt: skip


def test_a_delegate_whose_child_is_cancelled() -> None:
    class Patient(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            ctx.do(Approve("go?"))
            return "went"

    class Boss(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            try:
                return ctx.do(Patient().on("x"))
            except DelegateFailed as e:
                ctx.do(Sleep(1))
                return f"without it: {e.child}"

    mesh = FakeMesh(Crew(Boss(), Patient()))
    run = mesh.start("x")
    mesh.get("r1/1").cancel(by="ana")
    assert run.result() == "without it: r1/1"
    assert story(run) == [
        "RunStarted", "StepPlanned 1 Delegate Patient", "StepFailed 1", "StepPlanned 2 Sleep sleep", "Woken 2", "RunDone",
    ]  # fmt: skip
    assert story(mesh.get("r1/1"))[-1] == "RunCancelled"


def test_words_that_come_too_late_are_refused() -> None:
    mesh = FakeMesh(Crew(Payer()))
    run = mesh.start("1")
    (item,) = run.waiting_for()
    run.approve(item)
    assert run.result() == "paid 1"
    answer = asyncio.run(mesh.runner.journal.signal(run.run_id, Approved(n=1)))
    assert (answer.why, answer.detail) == ("ended", "done")  # type: ignore[union-attr]


def test_step_errors_are_values() -> None:
    @tool
    def boom() -> str:
        """Raises."""
        raise KeyError("x")

    class All(Agent[list[str]]):
        def flow(self, task: str, ctx: Context) -> list[str]:
            return [
                type(v).__name__ if isinstance(v, StepError) else v
                for v in ctx.gather([boom.on(), boom.on()], errors=True)
            ]

    assert FakeMesh(All()).run("x") == ["ToolError", "ToolError"]
