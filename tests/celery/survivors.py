"""The crew that the survival tests run: four sub-agents of two LLM calls and one tool, gathered; then a writer."""

import os
import time

from agentmesh import Agent, Context, Crew, tool


@tool
def look_up(word: str) -> str:
    """Looks a word up.

    Args:
        word: the word.
    """
    with open(os.environ["SURVIVORS_LOG"], "a") as log:
        log.write(f"{word}\n")
    time.sleep(0.2)
    return f"meaning of {word}"


class Worker(Agent):
    """Looks one thing up."""

    tools = (look_up,)


class Writer(Agent):
    """Joins."""


class Lead(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        notes = ctx.gather([Worker().on(f"{task}-{i}") for i in range(4)])
        return ctx.do(Writer().on(" | ".join(notes)))


crew = Crew(Lead(), Worker(), Writer(), name="survivors", model="openai:fake")
