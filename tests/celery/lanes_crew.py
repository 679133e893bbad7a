"""A crew with two lanes in front of the model servers that the environment names."""

import os

from agentmesh import Agent, Context, Crew, Queue, ServerQueue
from agentmesh.message import user

PLACES = 4
URLS = os.environ.get("LANES_AT", "http://127.0.0.1:1").split()


class Patient(Agent[int]):
    """Asks for much, without haste."""

    model, queue = "local:m", "night"

    def flow(self, task: int, ctx: Context) -> int:
        """All at once; how many answers came."""
        return len(ctx.gather([self.ask([user(f"low {i}")]) for i in range(task)]))


class Urgent(Agent[int]):
    """Asks, and somebody waits."""

    model, queue = "local:m", "talk"

    def flow(self, task: int, ctx: Context) -> int:
        """All at once; how many answers came."""
        return len(ctx.gather([self.ask([user(f"now {i}")]) for i in range(task)]))


crew = Crew(
    Patient(), Urgent(), name="lanes",
    queues=[
        Queue("main"),
        ServerQueue("night", model="m", urls=URLS, lane="low", concurrency=PLACES),
        ServerQueue("talk", model="m", urls=URLS[::-1], lane="realtime", concurrency=1),
    ],
)  # fmt: skip
