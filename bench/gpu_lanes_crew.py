"""The crew of `gpu_lanes.py`: many who are patient and few who are urgent, in two lanes or all in one.

In the device's process it writes down each step of the engine and which prompts are in it for the first time, and makes
the step take longer.
"""

import json
import os
import sys
import time
from typing import Any

from agentmesh import Agent, Context, Crew, DeviceQueue, Queue
from agentmesh.message import user

MODEL, PLACES = "tiny", int(os.environ.get("BENCH_PLACES", "32"))
IN_LANES = os.environ.get("BENCH_LANES") == "yes"
NEW_TOKENS = 8


class Patient(Agent[int]):
    """Asks `task[0]` times at once; `task[1]` makes the prompts unlike any other's."""

    model, queue = f"local:{MODEL}", "night"
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}

    def flow(self, task: list[int], ctx: Context) -> int:
        """All at once."""
        return len(ctx.gather(self.ask([user(f"{task[1]}-{i} patient")], plain=True) for i in range(task[0])))


class Urgent(Agent[str]):
    """Asks once, and somebody waits."""

    model, queue = f"local:{MODEL}", "talk" if IN_LANES else "night"
    options = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}

    def flow(self, task: str, ctx: Context) -> str:
        """Once."""
        return ctx.do(self.ask([user(f"{task} urgent")], plain=True)).text


def write_down(path: str) -> None:
    """From now on, each step of this process's engine goes into a file."""
    from agentmesh.inference.sampling import Sampler

    seen: set[str] = set()
    out = open(path, "a", buffering=1)  # noqa: SIM115  # until the process ends
    prepare, step_s = Sampler.prepare_tensor_args, float(os.environ["BENCH_STEP_MS"]) / 1000

    def prepared(self: Any, requests_in_batch: list[Any], arg_storage: Any) -> Any:
        now, fresh = time.time(), []
        for future in requests_in_batch:
            name = future.state.request_id
            if name not in seen:
                seen.add(name)
                fresh.append(list(self._rows[name].request.tokens) if name in self._rows else [])
        out.write(json.dumps([now, len(requests_in_batch), fresh]) + "\n")
        time.sleep(step_s)
        return prepare(self, requests_in_batch, arg_storage)

    Sampler.prepare_tensor_args = prepared  # type: ignore[method-assign]


if "BENCH_STEPS" in os.environ and "agentmesh.worker.gpu_worker" in " ".join(sys.orig_argv):
    write_down(os.environ["BENCH_STEPS"])

night = DeviceQueue("night", model=MODEL, lane="low", concurrency=PLACES)
talk = DeviceQueue("talk", model=MODEL, lane="realtime", concurrency=PLACES)
crew = Crew(Patient(), Urgent(), name="bench-lanes", queues=[Queue("main"), night, *([talk] if IN_LANES else [])])
