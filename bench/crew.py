"""The crew of the benchmarks: an agent with one tool, and a fan-out over agents of two calls."""

import os

from agentmesh import Agent, Context, Crew, Queue, tool
from agentmesh.message import user


@tool
async def look_up(word: str) -> str:
    """Looks a word up."""
    return f"meaning of {word}"


class Asker(Agent):
    """Two LLM calls and one tool."""

    tools = (look_up,)
    instructions = "Look the word up, then answer."


class Echo(Agent):
    """One sub-agent: two calls in its own run."""

    def flow(self, task: str, ctx: Context) -> str:
        first = ctx.do(self.ask([user(task)]))
        return ctx.do(self.ask([user(first.text)])).text


class Fan(Agent[int]):
    """As many sub-agents as asked, gathered."""

    def flow(self, task: int, ctx: Context) -> int:
        return len(ctx.gather(Echo().on(f"topic {i}") for i in range(task)))


crew = Crew(
    Asker(), Fan(), Echo(), name="bench", model="openai:fake",
    queues=[Queue("main", concurrency=int(os.environ.get("BENCH_CONCURRENCY", "2000")))],
)  # fmt: skip
