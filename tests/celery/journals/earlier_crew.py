"""The crew whose runs stand in earlier_journal.json: they were left in every state that an open run can be in."""

import os
from typing import Any

from agentmesh import Agent, Approve, Context, Crew, Limits, Sleep, tool
from agentmesh.message import Message, Usage
from agentmesh.model import Answer, Prompt


class Echo:
    """A model that repeats what it was asked."""

    async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
        return Answer(Message("assistant", f"<{prompt.messages[-1].text}>"), Usage(1, 1))

    async def close(self) -> None: ...


@tool
async def add(a: int, b: int) -> int:
    """Add.

    Args:
        a: one.
        b: the other.
    """
    return a + b


@tool(approve=True)
async def refund(order: int) -> str:
    """Refund an order.

    Args:
        order: which.
    """
    return f"refunded {order}"


@tool(delivery="at_most_once")
async def pay(order: int) -> str:
    """Pay an order.

    Args:
        order: which.
    """
    return f"paid {order}"


@tool(retries=3)
async def fragile(x: int) -> int:
    """Fails where the environment says so.

    Args:
        x: a number.
    """
    if os.environ.get("EARLIER_FAILS"):
        raise ValueError("not now")
    return x * 2


@tool(retries=0)
async def broken(x: int) -> int:
    """Fails for good where the environment says so.

    Args:
        x: a number.
    """
    if os.environ.get("EARLIER_FAILS"):
        raise ValueError("not at all")
    return x + 1


class Talk(Agent):
    """Asks its model, once."""


class Child(Agent[str]):
    def flow(self, task: str, ctx: Context) -> str:
        if task == "approve":
            ctx.do(Approve(f"may {task}?", {"why": "a test"}))
        return f"{task}: {ctx.do(add.on(20, 22))}"


class Every(Agent[Any, Any]):
    team = (Talk(), Child())
    tools = (add, refund, pay, fragile, broken)

    def flow(self, task: str, ctx: Context) -> Any:
        return getattr(self, f"_{task}")(ctx)

    def _add(self, ctx: Context) -> Any:
        return ctx.do(add.on(ctx.do(add.on(1, 2)), 3))

    def _refund(self, ctx: Context) -> Any:
        return ctx.do(refund.on(7))

    def _approve(self, ctx: Context) -> Any:
        ctx.do(Approve("go on?"))
        return ctx.do(add.on(1, 1))

    def _sleep(self, ctx: Context) -> Any:
        ctx.do(Sleep(5))
        return ctx.do(add.on(2, 2))

    def _gather(self, ctx: Context) -> Any:
        return ctx.gather([add.on(i, i) for i in range(6)], window=3)

    def _children(self, ctx: Context) -> Any:
        return ctx.gather([Child().on(t) for t in ("approve", "one", "two")], window=2)

    def _mixed(self, ctx: Context) -> Any:
        steps = [add.on(1, 1), refund.on(8), Child().on("three"), Sleep(3), fragile.on(4)]
        return ctx.gather(steps, need=4, deadline_s=3600)

    def _child(self, ctx: Context) -> Any:
        return ctx.do(Child().on("approve"))

    def _fragile(self, ctx: Context) -> Any:
        return ctx.do(fragile.on(21))

    def _pay(self, ctx: Context) -> Any:
        return ctx.do(pay.on(9))

    def _broken(self, ctx: Context) -> Any:
        first, child, last = ctx.do(add.on(5, 5)), ctx.do(Child().on("done")), ctx.do(broken.on(1))
        return [first, child, last]

    def _ask(self, ctx: Context) -> Any:
        return [ctx.do(Talk().on("hello")), ctx.do(Talk().on("again"))]


crew = Crew(Every(), name="earlier", model=Echo(), limits=Limits(turns=1))
