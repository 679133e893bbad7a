"""The crew of the wrong clocks: a tool that writes down what time it thinks it is, a sleep, the tool again."""

import os
import time

from agentmesh import Agent, Context, Crew, Sleep, ToolContext, tool


@tool
def note(*, c: ToolContext = ToolContext()) -> str:
    """Writes its step's key and this process's time."""
    time.sleep(0.1)
    with open(os.environ["SLEEPERS_LOG"], "a") as log:
        log.write(f"{c.key} {time.time()}\n")
    return c.run_id


class Sleeper(Agent):
    """Notes, sleeps, notes."""

    def flow(self, task: float, ctx: Context) -> str:
        ctx.do(note.on())
        ctx.do(Sleep(task))
        return ctx.do(note.on())


crew = Crew(Sleeper(), name="sleepers")
