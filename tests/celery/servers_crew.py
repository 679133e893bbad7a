"""A crew whose model calls go to the servers that the environment names."""

import os

from agentmesh import Agent, Context, Crew, Queue, ServerQueue


class Asker(Agent):
    """Asks."""

    model = "local:big"


class Many(Agent[list[str]]):
    def flow(self, task: int, ctx: Context) -> list[str]:
        return ctx.gather([Asker().on(f"w{i}") for i in range(task)])


gpu = ServerQueue("gpu", model="big", urls=os.environ["SERVER_URLS"].split(), concurrency=64)
crew = Crew(Many(), Asker(), name="servers", queues=[Queue("main"), gpu])
