"""Gathers: tuples keep the type of each member; lists, generators, errors, quorums."""

from collections.abc import Sequence
from typing import assert_type

from agentmesh import Agent, Context, StepError, tool
from agentmesh.definitions.step import Step
from agentmesh.testing import FakeMesh


class Animal:
    pass


class Dog(Animal):
    pass


@tool
def text(of: str) -> str:
    """Text."""
    return of


@tool
async def size(of: str) -> int:
    """A number."""
    return len(of)


@tool
def flag(of: str) -> bool:
    """A flag."""
    return bool(of)


def kennel(ctx: Context, dog: Step[Dog], both: list[Step[Animal]]) -> Sequence[Animal]:
    animals: list[Step[Animal]] = [dog, *both]  # covariant
    assert_type(ctx.gather(animals), list[Animal])
    return ctx.gather([dog])


class Desk(Agent[list[object]]):
    def flow(self, task: str, ctx: Context) -> list[object]:
        a, b = ctx.gather((text.on(task), size.on(task)))
        assert_type(a, str)
        assert_type(b, int)
        three = ctx.gather((text.on(task), size.on(task), flag.on(task)), window=2)
        assert_type(three, tuple[str, int, bool])
        six = ctx.gather((text.on(task), size.on(task), flag.on(task), text.on(""), size.on(""), flag.on("")))
        assert_type(six, tuple[str, int, bool, str, int, bool])
        some = ctx.gather((text.on(task), size.on(task)), errors=True, deadline_s=60)
        assert_type(some, tuple[str | StepError, int | StepError])
        any_length = ctx.gather(tuple(size.on(c) for c in task))
        assert_type(any_length, tuple[int, ...])
        each = ctx.gather([size.on(c) for c in task])
        assert_type(each, list[int])
        lazily = ctx.gather(size.on(c) for c in task)
        assert_type(lazily, list[int])
        assert_type(ctx.gather([text.on("x")], errors=True), list[str | StepError])
        assert_type(ctx.gather([text.on("x")], need=0.5, deadline_s=5, window=1), list[str])
        assert_type(ctx.gather((text.on("x"), text.on("y")), need=1), list[str])
        return [a, b, three, six, some, any_length, each, lazily]


assert FakeMesh(Desk()).run("tea") == [
    "tea", 3, ["tea", 3, True], ["tea", 3, True, "", 0, False], ["tea", 3], [1, 1, 1], [1, 1, 1], [1, 1, 1],
]  # fmt: skip
