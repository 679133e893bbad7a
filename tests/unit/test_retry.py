"""Retries of ended runs: steps that succeeded are not executed again, failed ones are; one scenario for each test."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from agentmesh import Agent, Approve, Context, Crew, RunError, RunFailedError, Sleep, StepError, ToolContext, tool
from agentmesh.journal.events import Event, RunStarted
from agentmesh.testing import FakeMesh, says

BROKEN: set[str] = set()
DONE: Counter[str] = Counter()  # attempts
KEYS: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    BROKEN.clear()
    DONE.clear()
    KEYS.clear()


@tool(retries=0)
def work(what: str, context: ToolContext = ToolContext()) -> str:
    """Works, unless it is broken."""
    DONE[what] += 1
    KEYS.append(context.key)
    if what in BROKEN:
        raise RuntimeError(f"{what} is broken")
    return what.upper()


class Line(Agent[str]):
    def flow(self, task: str, ctx: Context) -> str:
        one, two, three = (ctx.do(work.on(x)) for x in ("one", "two", "three"))
        return f"{one} {two} {three} {ctx.started_at}"


def times(events: list[Event]) -> list[tuple[str, int]]:
    return [(type(e).__name__, e.at_ms) for e in events]


def test_only_the_failed_step_is_done_again() -> None:
    BROKEN.add("three")
    mesh = FakeMesh(Line(), start_ms=1_000)
    run = mesh.start("x", run_id="r")
    with pytest.raises(RunFailedError, match="three is broken"):
        run.result()
    mesh.runner.now_ms += 60_000
    again = run.retry()
    assert (again.run_id, again.status()) == ("r~2", "failed")
    BROKEN.clear()
    mesh.runner.now_ms += 60_000
    third = run.retry()
    assert third.run_id == "r~3"
    assert third.result() == "ONE TWO THREE 1.0"
    assert DONE == {"one": 1, "two": 1, "three": 3}
    assert KEYS == ["r/1", "r/2", "r/3", "r/3", "r/3"]
    assert times(third.events())[:5] == times(run.events())[:5]
    assert [e.to_json()["e"] for e in third.events()[5:]] == ["StepPlanned", "StepDone", "RunDone"]
    with pytest.raises(RunError, match="r~3 is done"):
        run.retry()


def test_what_cannot_be_retried_says_what_to_do() -> None:
    class Asking(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            ctx.do(Approve("go?"))
            return "went"

    mesh = FakeMesh(Asking())
    run = mesh.start("x", run_id="r")
    with pytest.raises(RunError, match="is still open.*runs resume r.*runs resolve r N"):
        run.retry()
    run.deny(run.waiting_for()[0])
    assert run.status() == "failed"
    again = run.retry()
    assert [a.n for a in again.waiting_for()] == [1]
    again.approve(again.waiting_for()[0])
    assert again.result() == "went"
    with pytest.raises(RunError, match="no run 'nope'"):
        mesh.get("nope").retry()


def test_a_flow_that_raised_by_itself_is_replayed_over_everything() -> None:
    wrong = [True]

    class Buggy(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            got = ctx.gather([work.on("a"), work.on("b")])
            ctx.do(Sleep(5))
            if wrong:
                raise ValueError("a bug")
            return "".join(got)

    mesh = FakeMesh(Buggy())
    run = mesh.start("x")
    assert run.status() == "failed"
    wrong.clear()
    assert run.retry().result() == "AB"
    assert DONE == {"a": 1, "b": 1}


def test_failures_that_the_flow_handled_stay() -> None:
    class Handling(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            try:
                ctx.do(work.on("first"))
            except StepError:
                ctx.do(work.on("instead"))
            found = ctx.gather([work.on("p"), work.on("q")], errors=True)
            return ctx.do(work.on("last")) + str([isinstance(f, StepError) for f in found])

    BROKEN.update(("first", "q", "last"))
    run = FakeMesh(Handling()).start("x")
    BROKEN.clear()
    assert run.retry().result() == "LAST[False, True]"
    assert DONE == {"first": 1, "instead": 1, "p": 1, "q": 1, "last": 2}


@pytest.mark.parametrize("window", [0, 1, 2])
@pytest.mark.parametrize("broken", ["a", "d", "be", "abcde"])
def test_of_a_gather_only_the_failed_members_are_done_again(window: int, broken: str) -> None:
    class Wide(Agent[list[str]]):
        def flow(self, task: str, ctx: Context) -> list[str]:
            got = ctx.gather([work.on(x) for x in "abcde"], errors=True, window=window)
            for one in got:
                if isinstance(one, StepError):
                    raise one
            return [str(one) for one in got]

    BROKEN.update(broken)
    run = FakeMesh(Wide()).start("x")
    assert run.status() == "failed"
    BROKEN.clear()
    assert run.retry().result() == list("ABCDE")
    assert {x: 1 + (x in broken) for x in "abcde"} == DONE


def test_a_quorum_that_was_missed() -> None:
    class Quorum(Agent[list[str]]):
        def flow(self, task: str, ctx: Context) -> list[str]:
            return ctx.gather([work.on(x) for x in "abcd"], need=3)

    BROKEN.update("bcd")
    mesh = FakeMesh(Quorum())
    run = mesh.start("x")
    assert run.status() == "failed"
    BROKEN.clear()
    BROKEN.add("b")
    assert run.retry().result() == ["A", "C", "D"]
    assert DONE["a"] == 1


def test_a_quorum_that_was_met_stays_met() -> None:
    wrong = [True]

    class Quorum(Agent[list[str]]):
        def flow(self, task: str, ctx: Context) -> list[str]:
            got = ctx.gather([work.on(x) for x in "abc"], need=2)
            if wrong:
                raise ValueError("a bug")
            return got

    BROKEN.add("a")
    run = FakeMesh(Quorum()).start("x")
    wrong.clear()
    assert run.retry().result() == ["B", "C"]
    assert DONE == {"a": 1, "b": 1, "c": 1}


class Leaf(Agent[str]):
    part: str = ""

    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(work.on(f"{self.part}1")) + ctx.do(work.on(f"{self.part}2"))


class Branch(Agent[str]):
    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(work.on("branch")) + ctx.do(Leaf(part="deep").on("x"))


class Tree(Agent[str]):
    def flow(self, task: str, ctx: Context) -> str:
        return "-".join(ctx.gather([Leaf(part="left").on("x"), Leaf(part="right").on("x"), Branch().on("y")]))


@pytest.mark.parametrize("workers", [1, 3])
def test_sub_agents_go_on_where_they_were(workers: int) -> None:
    BROKEN.update(("right2", "deep2"))
    mesh = FakeMesh(Crew(Tree(), Branch(), Leaf()), workers=workers)
    run = mesh.start("x", run_id="t")
    assert run.status() == "failed"
    again = run.retry()
    assert again.status() == "failed"
    BROKEN.clear()
    third = again.retry()
    assert third.result() == "LEFT1LEFT2-RIGHT1RIGHT2-BRANCHDEEP1DEEP2"
    assert DONE["right2"] >= 3
    assert {what: n for what, n in DONE.items() if not what.endswith("2")} == {
        "left1": 1, "right1": 1, "branch": 1, "deep1": 1,
    }  # fmt: skip
    assert DONE["left2"] == 1
    started = mesh.get("t~3/2").events()[0]
    assert isinstance(started, RunStarted)
    assert (started.parent, started.parent_n) == ("t~3", 2)
    assert asyncio.run(mesh.runner.journal.tree("t~3")) == ["t~3", "t~3/2", "t~3/3", "t~3/3/2"]


def test_a_sub_agent_that_a_mended_flow_asks_something_else_begins_anew() -> None:
    part = ["old"]

    class Lead(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(Leaf(part=part[0]).on("x"))

    BROKEN.add("old2")
    run = FakeMesh(Crew(Lead(), Leaf())).start("x")
    part[0] = "new"
    again = run.retry()
    assert again.result() == "NEW1NEW2"
    assert DONE == {"old1": 1, "old2": 1, "new1": 1, "new2": 1}


def test_llm_turns_are_not_paid_again_and_are_counted_from_zero() -> None:
    asked: list[str] = []

    class Echo(Agent):
        """Says something."""

    class Lead(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            notes = ctx.gather([Echo().on("a"), Echo().on("b")])
            return ctx.do(work.on("end")) + "".join(notes)

    def model(prompt: Any) -> Any:
        asked.append(prompt.messages[-1].text)
        return says(prompt.messages[-1].text)

    BROKEN.add("end")
    mesh = FakeMesh(Crew(Lead(), Echo()), model=model)
    run = mesh.start("x")
    BROKEN.clear()
    again = run.retry()
    assert again.result() == "ENDab"
    assert sorted(asked) == ["a", "b"]
    heads = [r.head() for r in (run, again)]
    assert [h.turns for h in heads] == [2, 0]
