"""CPU of a run of 2 LLM calls and 1 tool: agentmesh on Celery beside a bare loop, and beside the same loop as plain Celery tasks.

    python bench/steps.py [--runs 400] [--rounds 3] [--broker rabbitmq]

With `--broker rabbitmq` there is one more row: a RabbitMQ carries the messages. No latency, 50 runs at a time; each
agentmesh step is its own Celery message, journaled. Client and worker CPU are counted together, store and broker apart.
The ways alternate; medians are printed. Ratios are within this run alone.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import cpu_s, fake_server, machine, median, valkey, valkey_cpu_s

from agentmesh.celery.event_loop import run_sync
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.valkey import EmbeddedValkey
from agentmesh.testing.servers import RabbitServer, running_server
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.supervisor import Supervisor

HERE = Path(__file__).parent
AT_ONCE = 50


def bare(url: str, runs: int) -> tuple[float, float]:
    """Wall and CPU of the hand-written loop."""
    done = subprocess.run(
        [sys.executable, str(HERE / "loop.py"), url, str(runs), str(AT_ONCE)],
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout)
    return told["wall_s"], told["cpu_s"]


def mesh_runs(
    mesh: Mesh, pids: list[int], url: str, runs: int, broker: RabbitServer | None
) -> tuple[float, float, float]:
    """Wall, CPU of client and workers, CPU of Valkey and RabbitMQ."""

    def servers_cpu_s() -> float:
        return valkey_cpu_s(url) + (cpu_s(broker.pid) if broker else 0.0)

    async def all_of(count: int) -> None:
        room = asyncio.Semaphore(AT_ONCE)

        async def one(i: int) -> None:
            async with room:
                await (await mesh.begin(mesh.crew.lead, f"word{i}"))

        await asyncio.gather(*[one(i) for i in range(count)])

    run_sync(all_of(20))
    store, cpu, began = servers_cpu_s(), time.process_time() + sum(map(cpu_s, pids)), time.perf_counter()
    run_sync(all_of(runs))
    return (
        time.perf_counter() - began,
        time.process_time() + sum(map(cpu_s, pids)) - cpu,
        servers_cpu_s() - store,
    )


def plain_celery(server: EmbeddedValkey, url: str, runs: int) -> tuple[float, float]:
    """The same calls as three chained Celery tasks on the threads pool with a Redis backend; nothing survives a kill."""
    env = {**os.environ, "BENCH_BROKER": server.broker_url, "OPENAI_BASE_URL": url}
    done = subprocess.run(
        [sys.executable, str(HERE / "plain.py"), str(runs), str(AT_ONCE)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    return told["wall_s"], told["cpu_s"]


@contextlib.contextmanager
def working(
    server: EmbeddedValkey, broker: RabbitServer | None
) -> Iterator[tuple[Mesh, Supervisor, RabbitServer | None]]:
    """A mesh with its worker; without a RabbitMQ the journal's server carries the messages too."""
    prefix = "rabbit:" if broker else "agentmesh:"
    config = Config(broker=broker.url if broker else server.broker_url, journal=server.url, prefix=prefix)
    crew = str(HERE / "crew.py")
    mesh = Mesh(load_crew(crew), config=config, models=ModelRegistry())
    supervisor = Supervisor([worker_command(config, crews=[crew], queues=[], concurrency=0)])
    supervisor.start()
    supervisor.wait_ready(20)
    yield mesh, supervisor, broker
    supervisor.stop()
    supervisor.join(10)
    mesh.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--broker", choices=["valkey", "rabbitmq"], default="valkey")
    given = parser.parse_args()
    rows: dict[str, list[tuple[float, ...]]] = {"bare loop": [], "agentmesh": [], "plain Celery": []}
    with contextlib.ExitStack() as stack:
        server, url = stack.enter_context(valkey()), stack.enter_context(fake_server())
        os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}
        ways = {"agentmesh": stack.enter_context(working(server, None))}
        if given.broker == "rabbitmq":
            rabbit = stack.enter_context(running_server(RabbitServer))
            ways["on RabbitMQ"], rows["on RabbitMQ"] = stack.enter_context(working(server, rabbit)), []
        for _ in range(given.rounds):
            rows["bare loop"].append(bare(url, given.runs))
            for name, (mesh, supervisor, broker) in ways.items():
                pids = list(supervisor.pids.values())
                rows[name].append(mesh_runs(mesh, pids, server.url, given.runs, broker))
            rows["plain Celery"].append(plain_celery(server, url, given.runs))
    print(f"{given.runs} runs of 2 LLM calls + 1 tool, {AT_ONCE} at a time, {given.rounds} rounds; {machine()}")
    base = median([r[1] for r in rows["bare loop"]])
    for name, found in rows.items():
        wall, cpu = median([r[0] for r in found]), median([r[1] for r in found])
        store = (
            f"   store+broker {median([r[2] for r in found]) / given.runs * 1e3:.2f} ms" if len(found[0]) > 2 else ""
        )
        print(
            f"{name:<13} {given.runs / wall:7.0f} runs/s   {cpu / given.runs * 1e3:6.2f} ms CPU a run   x {cpu / base:.2f}{store}"
        )


if __name__ == "__main__":
    main()
