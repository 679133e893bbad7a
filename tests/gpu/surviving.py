"""A crew whose answers are short, on a worker that can be held still: `test_survive.py` says what for.

While the file SURVIVING.held is there, its engine makes no step; each request adds a byte to SURVIVING.asked; the engine's
loop breaks at the first step after SURVIVING.fault came. SURVIVING_ENGINE=fake has slots and a clock for a model.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from agentmesh import Agent, Context, Crew, DeviceQueue, Queue
from agentmesh.message import user

PLACE, ENGINE = Path(os.environ.get("SURVIVING", "surviving")), os.environ.get("SURVIVING_ENGINE", "")
HELD, FAULT, ASKED = (PLACE.with_suffix(suffix) for suffix in (".held", ".fault", ".asked"))


class Batch(Agent[list[str]]):
    """Asks its model as often as it is told, all at once."""

    model = "local:tiny"
    options = {"max_tokens": 4, "temperature": 0.7, "seed": 3, "ignore_eos": True}
    retries = 0

    def flow(self, task: int, ctx: Context) -> list[str]:
        """A word each."""
        said = ctx.gather((self.ask([user(f"w{i}")], plain=True) for i in range(task)), errors=True)
        return [f"failed: {s}" if isinstance(s, Exception) else "said" for s in said]


class Long(Agent[str]):
    """Asks once, for many words."""

    model = "local:tiny"
    options = {"max_tokens": 800, "ignore_eos": True}

    def flow(self, task: int, ctx: Context) -> str:
        """Its model's words."""
        return ctx.do(self.ask([user(f"on {task}")], plain=True)).text


def wait() -> None:
    """For as long as the worker is held."""
    while HELD.exists():
        time.sleep(0.005)


def prepare_the_worker() -> None:
    """In the process of the device alone."""
    from transformers import LlamaForCausalLM

    from agentmesh.inference.engine import InferenceEngine
    from agentmesh.testing.slot_engine import SlotBatching, install

    submit, forward, step = InferenceEngine.submit, LlamaForCausalLM.forward, SlotBatching._step

    def counted(self: Any, *args: Any) -> Any:
        answer = submit(self, *args)
        with ASKED.open("ab") as asked:
            asked.write(b".")
        return answer

    def held(self: Any, *args: Any, **kwargs: Any) -> Any:
        wait()
        if FAULT.exists():
            FAULT.unlink()
            raise RuntimeError("a passing fault")
        return forward(self, *args, **kwargs)

    def held_step(self: Any) -> None:
        wait()
        step(self)

    InferenceEngine.submit = counted  # type: ignore[method-assign]
    LlamaForCausalLM.forward = held  # type: ignore[method-assign]
    SlotBatching._step = held_step  # type: ignore[method-assign]
    if ENGINE == "fake":
        install(step_s=0.02)


if "agentmesh.worker.gpu_worker" in " ".join(sys.orig_argv):
    prepare_the_worker()

crew = Crew(
    Batch(),
    Long(),
    name="surviving",
    queues=[Queue("main"), DeviceQueue("gpu", model="tiny", gpu_memory_fraction=0.05)],
)
