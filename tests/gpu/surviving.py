"""A crew whose answers are short, on a worker that can be held still: `test_survive.py` says what for.

While the file SURVIVING.held is there, its engine makes no step; each request adds a byte to SURVIVING.asked; the engine's
loop breaks at the first step after SURVIVING.fault came. SURVIVING_ENGINE=fake is an engine without a model.
"""

import os
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from agentmesh import Agent, Context, Crew, Queue
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


class FakeEngine:
    """Answers `#` for every token wanted, 20 ms after it was asked and not while it is held."""

    alive, hung_s = True, 0.0

    def __init__(self, model: Any, shape: Any = None, *, hopeless: Any = None) -> None:
        from agentmesh.gpu.request import Gauge, Room

        self.room, self.gauge = Room(2**20, 16, 1024, 300), Gauge()

    def admits(self, in_hand: int) -> int:
        return 256 - in_hand

    def submit(self, request: Any, hear: Any = None) -> "Future[Any]":
        from agentmesh.gpu.request import Done

        answer: Future[Any] = Future()

        def later() -> None:
            wait()
            if answer.set_running_or_notify_cancel():
                answer.set_result(Done((3,) * request.most_tokens, "length"))

        threading.Timer(0.02, later).start()
        return answer

    def close(self) -> None:
        pass


def wait() -> None:
    """For as long as the worker is held."""
    while HELD.exists():
        time.sleep(0.005)


def prepare_the_worker() -> None:
    """In the process of the device alone."""
    from transformers import LlamaForCausalLM

    import agentmesh.gpu.load

    engine: Any = FakeEngine if ENGINE == "fake" else agentmesh.gpu.load.Engine
    submit, forward = engine.submit, LlamaForCausalLM.forward

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

    engine.submit = counted
    agentmesh.gpu.load.Engine = engine  # type: ignore[misc]
    LlamaForCausalLM.forward = held  # type: ignore[method-assign]


if "agentmesh.cli.device" in " ".join(sys.orig_argv):
    prepare_the_worker()

crew = Crew(Batch(), Long(), name="surviving", queues=[Queue("main"), Queue("gpu", model="tiny")])
