"""Steps side by side through the real engine on a FakeMesh: order, errors, quorums, deadlines, windows."""

import asyncio
from typing import Any

import pytest

from agentmesh import (
    Agent,
    Context,
    Crew,
    QuorumMissed,
    RunFailedError,
    Sleep,
    StepError,
    tool,
)
from agentmesh.testing import FakeMesh


def gathering(**how: Any) -> type[Agent[Any, Any]]:
    @tool
    def even(x: int) -> int:
        """Only even ones."""
        if x % 2:
            raise ValueError(f"{x} is odd")
        return x

    class G(Agent[Any, Any]):
        def flow(self, task: list[int], ctx: Context) -> Any:
            got = ctx.gather([even.on(x) for x in task], **how)
            return [f"{type(g).__name__}" if isinstance(g, StepError) else g for g in got]

    return G


def test_gather_gives_values_in_the_order_asked() -> None:
    assert FakeMesh(gathering()()).run([4, 2, 6]) == [4, 2, 6]
    assert FakeMesh(gathering()()).run([]) == []
    assert FakeMesh(gathering()()).run([8]) == [8]


def test_gather_raises_the_first_error() -> None:
    with pytest.raises(RunFailedError, match="3 is odd"):
        FakeMesh(gathering()()).run([2, 3, 4])


def test_gather_with_errors_waits_for_all() -> None:
    assert FakeMesh(gathering(errors=True)()).run([1, 2, 3]) == ["ToolError", 2, "ToolError"]
    assert FakeMesh(gathering(errors=True)()).run([1]) == ["ToolError"]


def test_gather_with_need() -> None:
    assert FakeMesh(gathering(need=0.5)()).run([1, 2, 3, 4]) == [2, 4]
    with pytest.raises(RunFailedError, match="1 of 3 members succeeded, 2 were needed"):
        FakeMesh(gathering(need=2)()).run([1, 2, 3])
    with pytest.raises(RunFailedError, match=r"gather\(need=4\) of 3 steps"):
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
    with pytest.raises(RunFailedError, match="before the deadline"):
        FakeMesh(Crew(Lead(), Late())).run([60, 600])


def test_a_deadline_that_is_over_closes_at_once() -> None:
    class Late(Agent[int]):
        def flow(self, task: int, ctx: Context) -> int:
            ctx.do(Sleep(task))
            return task

    class Lead(Agent[list[int]]):
        def flow(self, task: list[int], ctx: Context) -> list[int]:
            return ctx.gather([Late().on(s) for s in task], deadline_s=0)

    with pytest.raises(RunFailedError, match="0 of 2 members succeeded, 1 were needed before the deadline"):
        FakeMesh(Crew(Lead(), Late())).run([60, 600])


@pytest.mark.parametrize("deadline_s", [-1, float("nan"), float("inf")])
def test_a_deadline_that_is_not_a_time(deadline_s: float) -> None:
    with pytest.raises(RunFailedError, match=r"gather\(deadline_s=.*\): give seconds, 0 or more"):
        FakeMesh(gathering(deadline_s=deadline_s)()).run([2, 4])


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


def test_quorum_missed_carries_its_errors_through_the_journal() -> None:
    class Asker(Agent[Any, Any]):
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
