"""How long an urgent request waits under a full low lane: from published to its first step in the engine's batch.

    python bench/gpu_lanes.py [--seconds 30] [--step-ms 40] [--places 32] [--waiting 256] [--broker rabbitmq]

One device worker with a small made model; a step takes so long more than it computes, as if on a device, with the CPU
free. So many low requests wait or are answered all the time, and one of a hundred requests is urgent. The second row has
all of them in one queue, for a third of the time; each runs until three were urgent. Published is when the journal's
script sends the step.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine, valkey

from agentmesh.config import Config
from agentmesh.errors import RunError
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing.servers import RabbitServer, running_server
from agentmesh.testing.tiny_models import make_tokenizer, save_model
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.supervisor import Supervisor

CREW = str(Path(__file__).parent / "gpu_lanes_crew.py")
SHARE, WARM_S, AT_ONCE, LEAST = 100, 3.0, 64, 3


@dataclass
class Row:
    """What a turn showed, in seconds."""

    waits: list[float]
    steps: list[float]
    batch: float
    low: int


@contextmanager
def load(mesh: Mesh, waiting: int) -> Iterator[list[int]]:
    """So many low requests are there all the time; how many were answered so far."""
    over, done = threading.Event(), [0]

    def keep(who: int) -> None:
        turn = 0
        while not over.is_set():
            run = mesh.start(mesh.crew.agents["Patient"], [AT_ONCE, who * 100_000 + turn])
            while not over.is_set() and run.status() == "open":
                time.sleep(0.05)
            turn, done[0] = turn + 1, done[0] + AT_ONCE
            if over.is_set():
                with suppress(RunError):  # it has ended by now
                    run.cancel()

    threads = [threading.Thread(target=keep, args=(i,)) for i in range(waiting // AT_ONCE)]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        over.set()
        for thread in threads:
            thread.join()


def measured(folder: Path, given: argparse.Namespace, *, in_lanes: bool) -> Row:
    """One turn with a fresh worker and a fresh store."""
    steps_in = folder / f"steps-{in_lanes}"
    env = {
        "BENCH_LANES": "yes" if in_lanes else "no", "BENCH_PLACES": str(given.places), "BENCH_STEPS": str(steps_in),
        "AGENTMESH_CACHE": str(folder), "OMP_NUM_THREADS": "1", "BENCH_STEP_MS": str(given.step_ms),
    }  # fmt: skip
    os.environ.update(env)
    sys.modules.pop("gpu_lanes_crew", None)
    with ExitStack() as stack:
        server = stack.enter_context(valkey())
        broker = stack.enter_context(running_server(RabbitServer)) if given.broker == "rabbitmq" else server
        config, crew = Config(broker=broker.broker_url, journal=server.url), load_crew(CREW)
        mesh = Mesh(crew, config=config)
        supervisor = Supervisor(worker_commands(config, {CREW: crew}), env=env, drain_s=1)
        supervisor.start()
        assert supervisor.wait_ready(120)
        try:
            with load(mesh, given.waiting) as done:
                time.sleep(min(WARM_S, given.seconds / 3))
                before, began = done[0], time.time()
                sent: dict[str, Any] = {}
                while time.time() - began < given.seconds / (1 if in_lanes else 3) or len(sent) < LEAST:
                    time.sleep(0.05)
                    if (done[0] - before) / SHARE >= len(sent) + 1:
                        sent[f"u{len(sent)}-"] = mesh.start(crew.agents["Urgent"], f"u{len(sent)}-")
                for run in sent.values():
                    run.result(timeout_s=120)
                low = done[0] - before
            published = {name: run.events()[0].at_ms / 1000 for name, run in sent.items()}
        finally:
            supervisor.stop(now=True)
            supervisor.join(10)
            mesh.close()
    return read(steps_in, published, began, low)


def read(steps_in: Path, published: dict[str, float], began: float, low: int) -> Row:
    """What the worker wrote down."""
    tokenizer, first, at, sizes = make_tokenizer(), {}, [], []
    for line in steps_in.read_text().splitlines():
        now, size, fresh = json.loads(line)
        if now >= began:
            at.append(now)
            sizes.append(size)
        for text in map(tokenizer.decode, fresh):
            first |= {name: now for name in published if f"{name} urgent" in text}
    assert first.keys() == published.keys()
    waits = [first[name] - sent for name, sent in published.items()]
    return Row(waits, [b - a for a, b in itertools.pairwise(at)], statistics.mean(sizes), low)


def ms(values: list[float]) -> str:
    """Median and 95th percentile."""
    return f"{1000 * statistics.median(values):8.0f} {1000 * p95(values):8.0f}"


def p95(values: list[float]) -> float:
    """The 95th percentile."""
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--places", type=int, default=32)
    parser.add_argument("--waiting", type=int, default=256)
    parser.add_argument("--broker", choices=["valkey", "rabbitmq"], default="valkey")
    parser.add_argument("--step-ms", type=float, default=40)
    given = parser.parse_args()
    print(f"{given.waiting} low requests, {given.places} places, 1 in {SHARE} urgent; {given.broker}; {machine()}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        save_model(Path(folder))
        rows = {name: measured(Path(folder), given, in_lanes=name == "lanes") for name in ("lanes", "one queue")}
    print("ms                 wait p50      p95   step p50      p95   batch   urgent of all")
    for name, row in rows.items():
        share = f"{len(row.waits)} of {row.low + len(row.waits)}"
        print(f"{name:<16} {ms(row.waits)}   {ms(row.steps)}  {row.batch:6.1f}   {share}")
    lanes, one, step = p95(rows["lanes"].waits), p95(rows["one queue"].waits), statistics.median(rows["lanes"].steps)
    print(f"p95 in lanes is one step and {1000 * (lanes - step):.0f} ms; in one queue {one / lanes:.0f} x as long")
    print(f"the longest wait in lanes: {1000 * max(rows['lanes'].waits):.0f} ms")


if __name__ == "__main__":
    main()
