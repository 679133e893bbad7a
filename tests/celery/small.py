"""A run of few commands: a tool that may run once, one LLM call, two tools gathered."""

import os
import time

from agentmesh import Agent, Context, Crew, tool


def note(line: str) -> None:
    log = os.open(os.environ["SURVIVORS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{line}\n".encode())
    os.close(log)


@tool(delivery="at_most_once")
def pay(what: str) -> str:
    """Pays a thing.

    Args:
        what: the thing.
    """
    note(f"pay/{what}")
    time.sleep(0.03)
    return f"paid {what}"


@tool
def fetch(what: str) -> str:
    """Fetches a thing.

    Args:
        what: the thing.
    """
    note(f"fetch/{what}")
    return what.upper()


class Asker(Agent):
    """Asks."""


class Small(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        said = ctx.do(Asker().on(task))
        return f"{said}: {ctx.gather([fetch.on(f'{task}a'), fetch.on(f'{task}b')])}"


class Payer(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return " ".join(ctx.do(pay.on(f"{task}{i}")) for i in range(4))


crew = Crew(Small(), Asker(), Payer(), name="small", model="openai:fake")
