"""A crew whose model has a queue of its own. Its worker can be made to fail: ASKING_FAULT is `hang`, `cuda`, `poison` or `slow`.

A fault happens while the file ASKING_LOG.fault exists, which it removes first; `poison` at every prompt that has `@@@`.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agentmesh import Agent, Context, Crew, Queue
from agentmesh.message import user

FAULT, LOG = os.environ.get("ASKING_FAULT", ""), Path(os.environ.get("ASKING_LOG", "asking"))

AT = 3 + 31  # the made tokenizer's `@`


class Asker(Agent):
    """Asks once."""

    model = "local:tiny"
    options = {"max_tokens": 8, "temperature": 0.7, "seed": 3}
    retries = 0

    def flow(self, task: str, ctx: Context) -> str:
        """Its model's word."""
        return ctx.do(self.ask([user(task)])).text


class Many(Agent[list[str]]):
    """Asks as often as it is told, all at once, and says which failed."""

    def flow(self, task: str, ctx: Context) -> list[str]:
        """A word each."""
        said = ctx.gather((Asker().on(t) for t in task.split()), errors=True)
        return [s if isinstance(s, str) else f"failed: {type(s).__name__}" for s in said]


class Long(Asker):
    """Asks for many words."""

    options = {"max_tokens": 800, "temperature": 0.7, "seed": 3}


class Sixty(Asker):
    """Asks for as many words as it says."""

    options = {"max_tokens": 60, "ignore_eos": True}


def break_the_model() -> None:
    """The faults, in the worker's process alone."""
    from transformers import LlamaForCausalLM

    forward, once = LlamaForCausalLM.forward, LOG.with_suffix(".fault")
    sys.modules["__main__"].HUNG_AFTER_S = float(os.environ.get("ASKING_HUNG_S", "1"))  # type: ignore[attr-defined]  # of agentmesh.worker.gpu_worker

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        if FAULT in ("poison", "death"):
            ids = kwargs["input_ids"][0].tolist()
            if any(ids[i : i + 3] == [AT, AT, AT] for i in range(len(ids))):
                if FAULT == "death":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("a bad prompt")
        elif FAULT == "slow":
            time.sleep(0.03)
        elif once.exists():
            once.unlink()
            if FAULT == "cuda":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            time.sleep(600)
        return forward(self, *args, **kwargs)

    LlamaForCausalLM.forward = broken  # type: ignore[method-assign]


if FAULT and "agentmesh.worker.gpu_worker" in " ".join(sys.orig_argv):
    break_the_model()

crew = Crew(
    Many(), Asker(), Long(), Sixty(), name="asking",
    queues=[Queue("main"), Queue("gpu", model="tiny", gpu_memory=0.05)],
)  # fmt: skip
