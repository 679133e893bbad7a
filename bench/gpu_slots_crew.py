"""The crew of `gpu_slots.py` and `gpu_stream.py`: its device workers have slots and a clock instead of a model."""

import os
import sys
from pathlib import Path

from agentmesh import Agent, Context, Crew, DeviceQueue, Queue
from agentmesh.message import Message, Usage, user
from agentmesh.model import Answer, Prompt

ON_DEVICE = "agentmesh.worker.gpu_worker" in " ".join(sys.orig_argv)
NOTES = os.environ.get("BENCH_NOTES", "")

if ON_DEVICE:
    from agentmesh.testing.slot_engine import SlotModel, install

    if os.environ.get("BENCH_INSTANT"):  # the same worker on a model that answers at once

        async def ask(self: SlotModel, prompt: Prompt, on_token: object = None) -> Answer:
            """At once."""
            return Answer(Message("assistant", "0"), Usage(1, 1))

        SlotModel.ask = ask  # type: ignore[method-assign, assignment]

    install(
        slots=int(os.environ.get("BENCH_SLOTS", "256")), step_s=float(os.environ.get("BENCH_STEP_S", "0.05")),
        spread=float(os.environ.get("BENCH_SPREAD", "0.5")), stamps=bool(os.environ.get("BENCH_STAMPS")),
        note=Path(NOTES) / f"{os.getpid()}.jsonl" if NOTES else None,
    )  # fmt: skip


class Many(Agent[int]):
    """Asks its model so many times at once."""

    model = os.environ.get("BENCH_MODEL_NAME", "local:slots")
    options = {"max_tokens": int(os.environ.get("BENCH_NEW_TOKENS", "40")), "ignore_eos": True}

    def flow(self, task: int, ctx: Context) -> int:
        """How many answers were not empty."""
        said = ctx.gather(self.ask([user(f"case {i}: sum up")], plain=True) for i in range(task))
        return sum(bool(s.text) for s in said)


class One(Many):
    """Asks its model once, and is listened to."""

    def flow(self, task: int, ctx: Context) -> int:
        """How long the answer is."""
        return len(ctx.do(self.ask([user(f"case {task}")], plain=True)).text)


crew = Crew(
    Many(),
    One(),
    name="slots",
    queues=[
        Queue("main"),
        DeviceQueue("gpu", model="slots", concurrency=int(os.environ.get("BENCH_CONCURRENCY", "0"))),
    ],
)
