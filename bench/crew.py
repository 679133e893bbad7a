"""The crew of the benchmarks: an agent with one tool, and a fan-out over agents of two calls."""

import os

from agentmesh import Agent, Approve, Context, Crew, Queue, tool
from agentmesh.message import user


@tool
async def look_up(word: str) -> str:
    """Looks a word up."""
    return f"meaning of {word}"


@tool
async def nothing(number: int) -> int:
    """Does nothing."""
    return number


class Asker(Agent):
    """Two LLM calls and one tool."""

    tools = (look_up,)
    instructions = "Look the word up, then answer."


class Echo(Agent):
    """One sub-agent: two calls in its own run."""

    def flow(self, task: str, ctx: Context) -> str:
        first = ctx.do(self.ask([user(task)]))
        return ctx.do(self.ask([user(first.text)])).text


class Chain(Agent[int]):
    """So many steps that do nothing, one after the other."""

    def flow(self, task: int, ctx: Context) -> int:
        return sum(ctx.do(nothing.on(i)) for i in range(task))


class Waits(Agent):
    """Stays open until a person says yes."""

    def flow(self, task: str, ctx: Context) -> str:
        ctx.do(Approve(task))
        return task


class Fan(Agent[int]):
    """As many sub-agents as asked, gathered."""

    def flow(self, task: int, ctx: Context) -> int:
        return len(ctx.gather(Echo().on(f"topic {i}") for i in range(task)))


crew = Crew(
    Asker(), Fan(), Echo(), Chain(), Waits(), name="bench", model="openai:fake",
    queues=[Queue("main", concurrency=int(os.environ.get("BENCH_CONCURRENCY", "2000")))],
)  # fmt: skip
