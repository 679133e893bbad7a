"""`task_always_eager`: runs and canvases go to their end in this process; nobody answers at the broker's address."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from agentmesh import Agent, Context, Crew, Sleep, tool
from agentmesh.errors import MeshError, RunError
from agentmesh.mesh import Mesh
from agentmesh.testing import ScriptedModel, says


@tool(approve=True)
def refund(order: int) -> str:
    """Refunds.

    Args:
        order: its number.
    """
    return f"refunded {order}"


@tool
def sneak(text: str) -> str:
    """Begins a run from inside a step.

    Args:
        text: what.
    """
    return str(Kept.mesh.s(Echo(), text).apply_async().get())


class Kept:
    mesh: Mesh


class Echo(Agent):
    """Says what it is told."""


class Team(Agent):
    """Three side by side, after an hour's sleep."""

    def flow(self, task: str, ctx: Context) -> str:
        ctx.do(Sleep(3600))
        return " ".join(ctx.gather([Echo().on(f"{task}{i}") for i in range(3)]))


class Failing(Agent):
    """Fails."""

    def flow(self, task: str, ctx: Context) -> str:
        raise ValueError(f"not {task}")


class Desk(Agent):
    """Refunds when somebody says yes."""

    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(refund.on(7))


class Sneaky(Agent):
    """Calls the tool that it should not."""

    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(sneak.on(task))


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("eager", broker="amqp://127.0.0.1:1//", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True
    yield app
    app.close()


@pytest.fixture
def mesh(app: Celery) -> Iterator[Mesh]:
    model = ScriptedModel(lambda p: says(f"<{p.messages[-1].text}>"))
    mesh = Kept.mesh = Mesh(Crew(Echo(), Team(), Failing(), Desk(), Sneaky(), name="eager", model=model), app=app)
    yield mesh
    mesh.close()


def test_runs(mesh: Mesh) -> None:
    mesh.check()
    assert mesh.run(Team(), "a") == "<a0> <a1> <a2>"
    assert [head.status for head in mesh.runs()] == ["done"]
    run = mesh.start(Desk(), "x", run_id="desk")
    with pytest.raises(TimeoutError, match="approve"):
        run.result()
    run.approve(run.waiting_for()[0], by="ana")
    assert run.result() == "refunded 7"
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(mesh.run(Team(), "t"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == ["<t0> <t1> <t2>"] * 4


def test_canvases(mesh: Mesh, app: Celery) -> None:
    noted: list[Any] = []

    @app.task(shared=False, name="eager.note")
    def note(value: Any) -> Any:
        noted.append(value)
        return value

    assert mesh.s(Team(), "a").apply_async().get() == "<a0> <a1> <a2>"
    assert chain(mesh.s(Echo(), "a"), mesh.s(Echo()), note.s()).apply_async().get() == "<<a>>"
    assert noted == ["<<a>>"]
    assert group([mesh.s(Echo(), "a"), mesh.s(Echo(), "b")]).apply_async().get() == ["<a>", "<b>"]
    assert mesh.map(Echo(), "ab").apply_async().get() == ["<a>", "<b>"]
    assert chord([mesh.s(Echo(), "a"), note.s("b")], mesh.s(Echo())).apply_async().get() == '<["<a>","b"]>'
    mesh.s(Echo(), "linked").apply_async(link=note.s())
    assert noted[-1] == "<linked>"


def test_what_cannot_be(mesh: Mesh) -> None:
    with pytest.raises(RuntimeError, match="not x"):
        mesh.s(Failing(), "x").apply_async().get()
    with pytest.raises(RunError, match="is waiting for a decision"):
        mesh.s(Desk(), "x").apply_async().get()
    with pytest.raises(MeshError, match="would wait for itself"):
        mesh.run(Sneaky(), "x")
