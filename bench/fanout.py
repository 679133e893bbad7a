"""100 and 1,000 sub-agents of two 1 s LLM calls each on one worker: wall beside the ideal, and the worker's memory.

    python bench/fanout.py [--widths 100 1000]

The ideal is 2 s: everything at once and nothing costs anything. The bare loop on the official client does the same calls.
"""

import argparse
import asyncio
import os
import time
from pathlib import Path

import openai
from common import cpu_s, fake_server, machine, rss_mb, valkey

from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.supervisor import Supervisor

IDEAL_S = 2.0


async def bare(url: str, width: int) -> float:
    """The same calls without agentmesh."""
    async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:

        async def one(i: int) -> None:
            for _ in range(2):
                await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": f"topic {i}"}])

        began = time.perf_counter()
        await asyncio.gather(*[one(i) for i in range(width)])
        return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="*", default=[100, 1000])
    given = parser.parse_args()
    print(f"sub-agents of two 1 s calls, one worker process; {machine()}")
    with valkey() as server, fake_server(latency_s=1.0) as url:
        os.environ |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k"}
        config = Config(broker=server.broker_url, journal=server.url)
        crew = str(Path(__file__).parent / "crew.py")
        mesh = Mesh(load_crew(crew), config=config, models=ModelRegistry())
        fan = mesh.crew.agent("Fan")
        supervisor = Supervisor([worker_command(config, crews=[crew], queues=[], concurrency=0)])
        supervisor.start()
        supervisor.wait_ready(20)
        (pid,) = supervisor.pids.values()
        mesh.run(fan, 5, timeout_s=60)
        for width in given.widths:
            cpu, began = cpu_s(pid), time.perf_counter()
            assert mesh.run(fan, width, timeout_s=300) == width
            wall, used = time.perf_counter() - began, cpu_s(pid) - cpu
            loop = asyncio.run(bare(url, width))
            print(
                f"{width:>5}  agentmesh {wall:5.2f} s  x {wall / IDEAL_S:.2f} of the ideal   "
                f"bare loop {loop:5.2f} s  x {loop / IDEAL_S:.2f}   "
                f"worker {used / width * 1e3:.2f} ms CPU a sub-agent, {rss_mb(pid):.0f} MB"
            )
        supervisor.stop()
        supervisor.join(10)
        mesh.close()


if __name__ == "__main__":
    main()
