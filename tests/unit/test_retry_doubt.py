"""Retries of runs that were cut off in the midst of a step that may run once."""

import asyncio
from typing import Any

import pytest

from agentmesh import Agent, Context, tool
from agentmesh.definitions.tool import NotDone
from agentmesh.engine.run import Run
from agentmesh.journal.types import Claimed
from agentmesh.testing import FakeMesh


def cut_off(flow_tool: Any, *, died: bool = False) -> tuple[FakeMesh, Run[Any]]:
    """A run that was cancelled while its only step was in a worker's hand."""

    class Once(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(flow_tool.on(40))

    mesh = FakeMesh(Once())
    mesh.runner.paused = True
    run = mesh.start("x", run_id="r")
    claimed = asyncio.run(mesh.runner.journal.claim(
        "s|r|1", worker="w", token="t", version=0, crew=mesh.crew.name, crew_version=""
    ))  # fmt: skip
    assert isinstance(claimed, Claimed)
    if died:
        asyncio.run(mesh.runner.journal.release("w", crashed=True))
    run.cancel()
    mesh.runner.paused = False
    return mesh, run


@pytest.mark.parametrize("died", [False, True])
@pytest.mark.parametrize("later", [0, 60_000])
def test_an_at_most_once_step_that_was_cut_off_is_held_in_doubt(later: int, died: bool) -> None:
    paid: list[int] = []

    @tool(delivery="at_most_once")
    def pay(amount: int) -> str:
        """Pays."""
        paid.append(amount)
        return f"paid {amount}"

    mesh, run = cut_off(pay, died=died)
    mesh.runner.now_ms += later
    asyncio.run(mesh.runner.journal.sweep("s"))  # later, its lease has run out
    again = run.retry()
    assert [(a.n, a.why) for a in again.waiting_for()] == [(1, "in_doubt")]
    again.cancel()
    third = again.retry()
    assert [(a.n, a.why) for a in third.waiting_for()] == [(1, "in_doubt")]
    assert not paid
    third.resolve(third.waiting_for()[0], "retry")
    assert third.result() == "paid 40"


def test_reconcile_is_asked_with_the_first_runs_key() -> None:
    asked: list[str] = []

    def known(key: str) -> Any:
        asked.append(key)
        return NotDone

    @tool(delivery="at_most_once", reconcile=known)
    def pay(amount: int) -> str:
        """Pays."""
        return f"paid {amount}"

    _, run = cut_off(pay)
    assert run.retry().result() == "paid 40"
    assert asked == ["r/1"]


def test_an_at_most_once_step_that_nobody_had_begun_is_simply_done() -> None:
    @tool(delivery="at_most_once", approve=True)
    def pay(amount: int) -> str:
        """Pays."""
        return f"paid {amount}"

    class Once(Agent[str]):
        def flow(self, task: str, ctx: Context) -> str:
            return ctx.do(pay.on(40))

    run = FakeMesh(Once()).start("x")
    run.cancel()
    again = run.retry()
    assert [a.why for a in again.waiting_for()] == ["approve"]
    again.approve(again.waiting_for()[0])
    assert again.result() == "paid 40"
