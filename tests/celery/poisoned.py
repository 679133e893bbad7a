"""The crew of the poison test: 500 tools side by side, one of which kills its process, and runs that have nothing to do with it."""

import asyncio
import os
import signal
import time

from agentmesh import Agent, Context, Crew, Queue, tool


def lines() -> list[str]:
    with open(os.environ["POISON_LOG"]) as log:
        return [line.split()[0] for line in log]


def say(what: object) -> None:
    with open(os.environ["POISON_LOG"], "a") as log:
        log.write(f"{what} {os.getpid()}\n")


@tool
async def work(i: int) -> int:
    """Works, or kills.

    Args:
        i: which.
    """
    say(i)
    if i == 7:
        until = time.monotonic() + 5
        while len(set(lines())) < 500 and time.monotonic() < until:  # all are in flight
            await asyncio.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    if len(set(lines())) < 500 or lines().count("7") < 2:  # nobody ends before the first death
        await asyncio.sleep(5)
    return i


@tool
async def mind(whose: str) -> str:
    """Minds its own business.

    Args:
        whose: business.
    """
    say(whose)
    await asyncio.sleep(0.05)
    return whose


class Lead(Agent[int]):
    def flow(self, task: str, ctx: Context) -> int:
        return len(ctx.gather([work.on(i) for i in range(500)], errors=True))


class Other(Agent[int]):
    def flow(self, task: str, ctx: Context) -> int:
        return len([ctx.do(mind.on(task)) for _ in range(20)])


crew = Crew(Lead(), Other(), name="poisoned", queues=[Queue("main", concurrency=600)], model="openai:fake")
