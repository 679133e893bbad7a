"""`Agent[Out, In]`: which types an agent has, from its bases and its flow; and what a tuple gathered is."""

import types
from typing import Any, Generic, TypeVar

import pytest
from pydantic import BaseModel

from agentmesh import Agent, Context, DefinitionError, StepError, tool
from agentmesh.testing import FakeMesh, says

T = TypeVar("T")
U = TypeVar("U")


class Order(BaseModel):
    number: int


class Rush(Order):
    pass


class Verdict(BaseModel):
    good: bool


class Echo(Agent):
    pass


class Judge(Agent[Verdict]):
    pass


class Clerk(Agent[Verdict, Order]):
    pass


class Unsaid(Agent[Verdict]):
    def flow(self, task: list[Order], ctx: Context) -> Verdict:  # type: ignore[override]  # In is not said
        return Verdict(good=bool(task))


class Untyped(Agent[Verdict, Order]):
    def flow(self, task, ctx):  # type: ignore[no-untyped-def]
        return Verdict(good=True)


class Listed(Agent[list[T], U]):
    pass


class Orders(Listed[Order, Rush]):
    pass


class Inherits(Orders):
    pass


class Each(Agent[T, list[T]]):
    def flow(self, task: list[T], ctx: Context) -> T:
        return task[0]


class First(Each[int]):
    pass


@pytest.mark.parametrize(
    ("agent", "output", "task"),
    [
        (Echo, str, str),
        (Judge, Verdict, str),
        (Clerk, Verdict, Order),
        (Unsaid, Verdict, list[Order]),
        (Untyped, Verdict, Order),
        (Orders, list[Order], Rush),
        (Inherits, list[Order], Rush),
        (First, int, list[int]),
    ],
)
def test_types_of_an_agent(agent: type[Agent[Any, Any]], output: Any, task: Any) -> None:
    assert (agent.output, agent.task_type) == (output, task)


@pytest.mark.parametrize("wide", [Order, Any, object, Order | None, Order | int])
def test_a_flow_may_take_more_than_the_class_says(wide: Any) -> None:
    def flow(self: Any, task: Any, ctx: Context) -> str:
        return type(task).__name__

    flow.__annotations__["task"] = wide
    agent = types.new_class("Wide", (Agent[str, Rush],), exec_body=lambda names: names.update(flow=flow))
    assert agent.task_type is Rush
    assert FakeMesh(agent()).run(Rush(number=1)) == "Rush"


@pytest.mark.parametrize("other", [int, list[Rush], Rush | int])
def test_a_flow_that_takes_something_else_is_refused(other: Any) -> None:
    def flow(self: Any, task: Any, ctx: Context) -> str:
        return ""

    flow.__annotations__["task"] = other
    with pytest.raises(DefinitionError, match="agent `Bad` takes Order and its flow .*write the same type in"):
        types.new_class("Bad", (Agent[str, Order],), exec_body=lambda names: names.update(flow=flow))


def test_text_that_is_said_is_not_text_that_is_left_out() -> None:
    with pytest.raises(DefinitionError, match="agent `Bad` takes str and its flow int"):

        class Bad(Agent[int, str]):
            def flow(self, task: int, ctx: Context) -> int:  # type: ignore[override]
                return task


def test_the_default_flow_tells_a_task_that_is_not_text_as_json() -> None:
    run = FakeMesh(Clerk(), model=[says('{"good": true}')]).start(Order(number=7))
    assert run.messages()[0].text == '{"number":7}'
    assert run.result() == Verdict(good=True)


def test_a_task_of_another_type_is_refused() -> None:
    with pytest.raises(DefinitionError, match="the task of agent `Clerk`"):
        Clerk().on("order 7")  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="the task of agent `Clerk`"):
        Clerk().on()  # type: ignore[call-arg]


@tool
def half(of: int) -> int:
    """Half of an even number."""
    if of % 2:
        raise ValueError("odd")
    return of // 2


def test_a_tuple_of_steps_gives_a_tuple() -> None:
    seen: list[Any] = []

    class Desk(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            seen.clear()
            seen.append(ctx.gather((half.on(2), half.on(4))))
            seen.append(ctx.gather((half.on(6),)))
            seen.append(ctx.gather(()))
            seen.append(ctx.gather([half.on(2), half.on(4)]))
            seen.append(ctx.gather(half.on(n) for n in (2, 4)))
            seen.append(ctx.gather((half.on(2), half.on(3)), errors=True, deadline_s=60))
            seen.append(ctx.gather((half.on(2), half.on(3)), need=1))
            seen.append(ctx.gather((half.on(2), half.on(4)), deadline_s=60))
            return "done"

    assert FakeMesh(Desk()).run("x") == "done"
    pair, one, none, listed, lazily, (good, bad), some, timely = seen
    assert (pair, one, none, listed, lazily) == ((1, 2), (3,), (), [1, 2], [1, 2])
    assert good == 1
    assert isinstance(bad, StepError)
    assert (some, timely) == ([1], [1, 2])


def test_a_class_whose_type_is_open_has_no_agents() -> None:
    class Shelf(Agent[T], Generic[T]):
        """Of something."""

    class Books(Shelf[int]):
        """Of numbers."""

    assert Books().output is int
    for make in (Shelf, Shelf[int]):
        with pytest.raises(DefinitionError, match="agent `Shelf`: its type T is not given; write a subclass of Shelf"):
            make()


def test_an_answer_without_its_value_is_said_to_the_model() -> None:
    class Free(Agent[Any]):
        """Anything."""

    handle = FakeMesh(Free(), model=['{"a": 1}', '{"value": {"a": 1}}']).start("x")
    assert handle.result() == {"a": 1}
    assert any("is not JSON for Any: it needs `value`" in m.text for m in handle.messages())
