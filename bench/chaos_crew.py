"""The crews that the chaos runs: a planner, four sub-agents of two LLM calls and one tool, a writer; and tools that may run once."""

import os
import time

from agentmesh import Agent, Context, Crew, tool

TOOL_S = 0.03


def note(what: str) -> None:
    """One line into the oracle's file: one write, appended."""
    log = os.open(os.environ["CHAOS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{what}\n".encode())
    os.close(log)


@tool
def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: the word.
    """
    note(word)
    time.sleep(TOOL_S)
    return f"meaning of {word}"


@tool(delivery="at_most_once")
def pay(what: str) -> str:
    """Pays a thing, which must not happen twice.

    Args:
        what: the thing.
    """
    note(what)
    time.sleep(TOOL_S)
    return f"paid {what}"


class Planner(Agent):
    """Says what to look up."""


class Worker(Agent):
    """Looks one thing up."""

    tools = (look_up,)


class Writer(Agent):
    """Joins."""


class Lead(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        plan = ctx.do(Planner().on(task))
        notes = ctx.gather([Worker().on(f"{plan}-{i}") for i in range(4)])
        return ctx.do(Writer().on(" | ".join(notes)))


class Payer(Agent):
    """Pays eight things one after the other."""

    def flow(self, task: str, ctx: Context) -> str:
        for i in range(8):
            ctx.do(pay.on(f"{task}-{i}"))
        return f"all of {task}"


crew = Crew(Lead(), Planner(), Worker(), Writer(), Payer(), name="chaos", model="openai:fake")
