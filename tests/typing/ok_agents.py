"""Agents and crews: the types of task and output, of runs, of handles."""

from collections.abc import Sequence
from typing import Any, assert_type

from pydantic import BaseModel

from agentmesh import Agent, Approve, Context, Crew, Mesh, Run, Sleep, run, start
from agentmesh.definitions.step import Step
from agentmesh.testing import FakeMesh, says


class Order(BaseModel):
    id: int


class Verdict(BaseModel):
    good: bool


class Echo(Agent):
    """Text in, text out."""


class Judge(Agent[Verdict]):
    """Text in, a Verdict out."""

    strict: bool = False


class Clerk(Agent[Verdict, Order]):
    """An Order in, a Verdict out; the default flow."""


class Desk(Agent[list[Verdict], list[Order]]):
    team = (Echo(), Judge(strict=True), Clerk())

    def flow(self, task: list[Order], ctx: Context) -> list[Verdict]:
        assert_type(ctx.do(Echo().on("x")), str)
        assert_type(ctx.do(Echo().on()), str)
        assert_type(ctx.do(Approve("Go on?")), None)
        assert_type(ctx.do(Sleep(1)), None)
        assert_type(ctx.do(self.ask([])).text, str)
        assert_type(Judge().on("x"), Step[Verdict])
        return ctx.gather([Clerk().on(order) for order in task])


class Wide(Agent[Verdict, Order]):
    def flow(self, task: BaseModel, ctx: Context) -> Verdict:
        return Verdict(good=bool(task.model_dump()))


crew = Crew(Desk(), Echo(), name="desk")
assert_type(crew, Crew[list[Verdict]])
assert_type(crew.lead.on([]), Step[list[Verdict]])
any_crew: Crew = crew
any_agents: Sequence[Agent[Any, Any]] = [Echo(), Judge(), Desk()]
wide: Agent[BaseModel, Order] = Clerk()  # covariant in what it gives


def runs() -> None:
    assert_type(run(Echo(), "x"), str)
    assert_type(run(Judge(), "x", timeout_s=5), Verdict)
    assert_type(start(Judge(), "x"), Run[Verdict])
    assert_type(start(Judge(), "x").result(), Verdict)


def on_a_mesh(mesh: Mesh) -> None:
    assert_type(mesh.run(Judge(), "x"), Verdict)
    assert_type(mesh.start(Clerk(), Order(id=1)), Run[Verdict])


assert FakeMesh(Clerk(), model=[says('{"good": true}')]).run(Order(id=7)) == Verdict(good=True)
assert FakeMesh(Wide()).run(Order(id=7)) == Verdict(good=True)
