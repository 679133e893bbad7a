"""The crew of the at-most-once test: three payments side by side; the file of effects is the oracle."""

import asyncio
import os
from pathlib import Path

from agentmesh import Agent, Context, Crew, ToolContext, tool
from agentmesh.definitions.tool import NotDone, Unknown

HERE = ToolContext()


def ledger() -> list[str]:
    """What the outside world knows: `began KEY` and, once it has happened, `paid KEY`."""
    return Path(os.environ["ONCE_LEDGER"]).read_text().splitlines()


async def paid(key: str) -> str:
    with open(os.environ["ONCE_LEDGER"], "a", buffering=1) as book:
        book.write(f"began {key}\n")
        await asyncio.sleep(0.12)
        book.write(f"paid {key}\n")
    await asyncio.sleep(0.12)
    return "paid"


def look(key: str) -> object:
    return "paid, said the bank" if f"paid {key}" in ledger() else NotDone


@tool(delivery="at_most_once", retries=0)
async def blind(i: int, context: ToolContext = HERE) -> str:
    """Pays where nobody can be asked.

    Args:
        i: which.
    """
    return await paid(context.key)


@tool(delivery="at_most_once", retries=0, reconcile=look)
async def known(i: int, context: ToolContext = HERE) -> str:
    """Pays where the bank knows.

    Args:
        i: which.
    """
    return await paid(context.key)


@tool(delivery="at_most_once", retries=0, reconcile=lambda key: Unknown)
async def vague(i: int, context: ToolContext = HERE) -> str:
    """Pays where the bank is asked and does not know.

    Args:
        i: which.
    """
    return await paid(context.key)


class Payer(Agent[list[str]]):
    def flow(self, task: int, ctx: Context) -> list[str]:
        return ctx.gather([t.on(task) for t in (blind, known, vague)])


crew = Crew(Payer(), name="once", model="openai:fake")
