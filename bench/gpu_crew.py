"""The crew of `gpu_ways.py`: one run that asks the local model as many times at once as it is told to."""

import os

from agentmesh import Agent, Context, Crew, DeviceQueue, Queue
from agentmesh.message import user

MODEL = os.environ.get("BENCH_MODEL", "smollm2")
MEMORY = float(os.environ.get("BENCH_MEMORY", "0.85"))
NEW_TOKENS = int(os.environ.get("BENCH_NEW_TOKENS", "32"))


def prompt(i: int, turn: int) -> str:
    """About a hundred tokens, unlike any other's from the first word on."""
    return (
        f"Case {turn}-{i}: "
        + " ".join(f"item {(i * 37 + turn * 11 + j * 7) % 997}" for j in range(24 + i % 8))
        + ". Sum up."
    )


class Batch(Agent[int]):
    """Asks `task[0]` times at once in turn `task[1]`; answers how many words came."""

    model = f"local:{MODEL}"
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}

    def flow(self, task: list[int], ctx: Context) -> int:
        """All at once."""
        said = ctx.gather(self.ask([user(prompt(i, task[1]))], plain=True) for i in range(task[0]))
        return sum(len(s.text.split()) for s in said)


crew = Crew(Batch(), name="bench", queues=[Queue("main"), DeviceQueue("gpu", model=MODEL, gpu_memory_fraction=MEMORY)])
