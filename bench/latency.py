"""How long a step takes on an idle machine, and whether it costs more beside ten thousand open runs.

    python bench/latency.py [--chains 100] [--open 10 10000]

A chain is a run of ten steps that do nothing (an async tool), one after the other, each its own Celery message; one supervised
worker process. Its wall time is from `mesh.begin` to the result in the client; a step's is a tenth of it. The open runs each
wait for a person, and the steps of other runs go on beside them.
"""

import argparse
import asyncio
import os
import time
from pathlib import Path

from common import cpu_s, machine, median, rss_mb, valkey, valkey_cpu_s

from agentmesh.celery.event_loop import run_sync
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.supervisor import Supervisor

STEPS, IDLE_S = 10, 20


async def chains(mesh: Mesh, count: int) -> list[float]:
    """Seconds of each of so many chains, one after the other."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await (await mesh.begin(mesh.crew.agent("Chain"), STEPS))
        took.append(time.perf_counter() - began)
    return took


async def side_by_side(mesh: Mesh, count: int) -> None:
    """So many chains at once."""
    runs = [await mesh.begin(mesh.crew.agent("Chain"), STEPS) for _ in range(count)]
    await asyncio.gather(*[run.result() for run in runs])


async def leave_open(mesh: Mesh, count: int) -> None:
    """Begin so many runs that wait for a person, and come back when all of them wait."""
    for first in range(0, count, 500):
        runs = [mesh.begin(mesh.crew.agent("Waits"), "?") for _ in range(min(500, count - first))]
        await asyncio.gather(*runs)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--chains", type=int, default=100)
    parser.add_argument("--open", type=int, nargs="*", default=[10, 10_000])
    given = parser.parse_args()
    print(machine())
    with valkey() as server:
        os.environ.setdefault("OPENAI_API_KEY", "k")
        os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")  # nobody is asked
        config = Config(broker=server.broker_url, journal=server.url)
        crew = str(Path(__file__).parent / "crew.py")
        mesh = Mesh(load_crew(crew), config=config, models=ModelRegistry())
        supervisor = Supervisor([worker_command(config, crews=[crew], queues=[], concurrency=0)])
        began = time.perf_counter()
        supervisor.start()
        supervisor.wait_ready(20)
        print(f"worker started to ready     {time.perf_counter() - began:.2f} s")
        (pid,) = supervisor.pids.values()
        run_sync(chains(mesh, 20))
        took = sorted(run_sync(chains(mesh, given.chains)))
        print(
            f"chain of {STEPS} steps           p50 {median(took) * 1e3:.1f} ms   p95 {took[int(len(took) * 0.95)] * 1e3:.1f} ms"
        )
        print(f"one step                    p50 {median(took) / STEPS * 1e3:.2f} ms")
        cpu, store, at = cpu_s(pid), valkey_cpu_s(server.url), time.perf_counter()
        time.sleep(IDLE_S)
        cpu, store, at = cpu_s(pid) - cpu, valkey_cpu_s(server.url) - store, time.perf_counter() - at
        print(f"idle                        worker {cpu / at * 1e3:.1f}, Valkey {store / at * 1e3:.1f} ms CPU a second")
        there, first = 0, 0.0
        for wanted in given.open:
            run_sync(leave_open(mesh, wanted - there))
            there = wanted
            run_sync(side_by_side(mesh, 50))
            costs = []
            for _ in range(3):
                cpu, store = time.process_time() + cpu_s(pid), valkey_cpu_s(server.url)
                run_sync(side_by_side(mesh, 100))
                used = time.process_time() + cpu_s(pid) - cpu + valkey_cpu_s(server.url) - store
                costs.append(used / 100 / (STEPS + 1) * 1e3)
            first = first or median(costs)
            print(f"{wanted:>6} open runs            {median(costs):.3f} ms CPU a step, client, worker and Valkey   "
                  f"x {median(costs) / first:.2f}   worker {rss_mb(pid):.0f} MB")  # fmt: skip
        run_sync(chains(mesh, 1))
        began = time.perf_counter()
        supervisor.stop()
        supervisor.join(10)
        print(f"worker told to stop to gone {time.perf_counter() - began:.2f} s")
        mesh.close()


if __name__ == "__main__":
    main()
