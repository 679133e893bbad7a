"""A crew with a prefork queue: tools that compute, die, and do not stop when their time is up."""

import ctypes
import os
import signal
import time

from agentmesh import Agent, Context, Crew, Queue, StepError, tool


def note(line: str) -> int:
    """One line into the file that the test reads; how many there are of it now."""
    with open(os.environ["COMPUTING_LOG"], "a") as log:
        log.write(f"{line} {os.getpid()}\n")
    with open(os.environ["COMPUTING_LOG"]) as log:
        return sum(text.startswith(f"{line} ") for text in log)


@tool(queue="cpu")
def add(i: int) -> int:
    """Computes.

    Args:
        i: a number.
    """
    note(f"add{i}")
    until = time.monotonic() + 0.3
    while time.monotonic() < until:
        i = i + 1 - 1
    return i


@tool(queue="cpu")
def die_once(name: str) -> str:
    """Kills its process the first time.

    Args:
        name: a name.
    """
    if note(name) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return name


@tool(queue="cpu")
def hang_once(name: str) -> str:
    """Is still at work the first time its host is killed.

    Args:
        name: a name.
    """
    if note(name) == 1:
        time.sleep(60)
    return name


@tool(queue="cpu", timeout_s=0.5, retries=1)
def spin(name: str) -> str:
    """Never stops.

    Args:
        name: a name.
    """
    note(name)
    while True:
        time.sleep(0.01)


@tool(queue="cpu", timeout_s=0.5, delivery="at_most_once")
def seize(name: str) -> str:
    """Never stops, and lets nobody else in its process do anything.

    Args:
        name: a name.
    """
    note(name)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter
    return name


@tool
async def here() -> int:
    """Where I/O is done."""
    return os.getpid()


class Sums(Agent[list[int]]):
    """Side by side."""

    def flow(self, task: str, ctx: Context) -> list[int]:
        ctx.do(here.on())
        return ctx.gather([add.on(i) for i in range(4)])


class One(Agent):
    """One call of the tool that the task names."""

    def flow(self, task: str, ctx: Context) -> str:
        tools = {"die": die_once, "hang": hang_once, "spin": spin, "seize": seize}
        try:
            return ctx.do(tools[task].on(task))
        except StepError as e:
            return type(e).__name__


crew = Crew(
    Sums(),
    One(),
    name="computing",
    queues=[Queue("main"), Queue("cpu", pool="prefork", concurrency=4)],
    model="openai:fake",
)
