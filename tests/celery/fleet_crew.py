"""A crew whose model calls go to the servers that the environment names."""

import os

from agentmesh import Agent, Context, Crew, Queue, ServerQueue


class Asker(Agent):
    """Asks."""

    model = "local:big"


class Many(Agent[list[str]]):
    def flow(self, task: int, ctx: Context) -> list[str]:
        return ctx.gather([Asker().on(f"w{i}") for i in range(task)])


gpu = ServerQueue("gpu", model="big", urls=os.environ["FLEET"].split(), concurrency=64)
crew = Crew(Many(), Asker(), name="fleet", queues=[Queue("main"), gpu])
