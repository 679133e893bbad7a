"""The crew of the versions test: its version, and what its flow asks for, come from the environment."""

import asyncio
import os

from agentmesh import Agent, Context, Crew, tool

VERSION = os.environ.get("VERSIONS_CREW", "1")
FLOW = os.environ.get("VERSIONS_FLOW", "")


@tool
async def old(i: int) -> str:
    """Works as ever.

    Args:
        i: which.
    """
    await asyncio.sleep(0.1)
    return f"v{VERSION}"


@tool
async def new(i: int) -> str:
    """Works otherwise.

    Args:
        i: which.
    """
    return f"v{VERSION}"


class Lead(Agent[list[str]]):
    def flow(self, task: int, ctx: Context) -> list[str]:
        said = [ctx.do(old.on(i)) for i in range(2)]
        said.append(ctx.do(new.on(2) if FLOW == "other" else old.on(2)))
        return said + ctx.gather([old.on(i) for i in range(4)])


crew = Crew(Lead(), name="versions", version=VERSION, model="openai:fake")
