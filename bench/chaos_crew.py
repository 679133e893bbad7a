"""The crew under chaos: a planner, four sub-agents of two LLM calls and one tool, gathered; then a writer."""

import os
import time

from agentmesh import Agent, Context, Crew, tool


@tool
def look_up(word: str) -> str:
    """Looks a word up."""
    line = f"{time.time()} {word}\n".encode()
    log = os.open(os.environ["CHAOS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line)
    os.close(log)
    time.sleep(0.1)
    return f"meaning of {word}"


class Planner(Agent):
    """Plans."""


class Worker(Agent):
    """Looks one thing up."""

    tools = (look_up,)


class Writer(Agent):
    """Joins."""


class Lead(Agent):
    """Four at once."""

    def flow(self, task: str, ctx: Context) -> str:
        """Plan, look up, write."""
        plan = ctx.do(Planner().on(f"plan {task}"))
        notes = ctx.gather([Worker().on(f"{task}-{i}") for i in range(4)])
        return ctx.do(Writer().on(" | ".join([plan, *notes])))


crew = Crew(Lead(), Planner(), Worker(), Writer(), name="chaos", model="openai:fake")
