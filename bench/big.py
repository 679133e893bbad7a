"""Big things: wide gathers, long runs, big values, many open runs. Memory of every process, the largest message, slow scripts.

    python bench/big.py [--only wide long value runs]

One worker in this process, so that its memory is the client's and the worker's together; the journal is a Valkey of its own.
The largest message is the longest text that the outbox keeps (`wires`), looked at while entries are open.
"""

import argparse
import asyncio
import os
import time
from typing import Any

import redis
from common import machine, rss_mb, valkey

from agentmesh import Agent, Context, Crew, tool
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.registry import runtime_of
from agentmesh.config import Config
from agentmesh.mesh import Mesh

SLOW_MS = 5


@tool
async def plus(i: int) -> int:
    """Adds one."""
    return i + 1


@tool(max_output_bytes=20_000_000)
async def big(size: int) -> list[str]:
    """A value of so many bytes."""
    return ["x" * 1000] * (size // 1000)


class Wide(Agent[int]):
    def flow(self, task: int, ctx: Context) -> int:
        return sum(ctx.gather([plus.on(i) for i in range(task)]))


class Leaf(Agent[int]):
    def flow(self, task: int, ctx: Context) -> int:
        return ctx.do(plus.on(task))


class WideAgents(Agent[int]):
    def flow(self, task: int, ctx: Context) -> int:
        return sum(ctx.gather([Leaf().on(i) for i in range(task)]))


class Long(Agent[int]):
    def flow(self, task: int, ctx: Context) -> int:
        n = 0
        for _ in range(task):
            n = ctx.do(plus.on(n))
        return n


class Value(Agent[list[str]]):
    def flow(self, task: int, ctx: Context) -> list[str]:
        return ctx.do(big.on(task))


class Scene:
    """A mesh and what is looked at after each of its runs."""

    def __init__(self, server: Any) -> None:
        self.client = redis.Redis.from_url(server.url)
        self.client.config_set("slowlog-log-slower-than", SLOW_MS * 1000)
        self.client.config_set("slowlog-max-len", 1000)
        crew = Crew(Wide(), Leaf(), WideAgents(), Long(), Value(), name="big", model="openai:none")
        self.mesh = Mesh(crew, config=Config(broker=server.broker_url, journal=server.url))

    def slowest_ms(self) -> float:
        """The longest that one command held the server since the last look."""
        found = max((entry["duration"] for entry in self.client.slowlog_get(1000)), default=0)
        self.client.slowlog_reset()
        return found / 1000

    def largest_message(self) -> int:
        """Bytes of the longest message among those that the outbox keeps now."""
        return max((len(v) for _, v in self.client.hscan_iter("agentmesh:wires", count=1000)), default=0)

    def used_mb(self) -> float:
        """Valkey's own account."""
        return float(self.client.info("memory")["used_memory"]) / 1e6  # type: ignore[index]

    def say(self, what: str, units: int, wall: float, cpu: float) -> None:
        print(
            f"{what:<28} {wall:6.2f} s   {cpu / units * 1e3:6.2f} ms CPU each   worker and client {rss_mb(os.getpid()):4.0f} MB   "
            f"Valkey {self.used_mb():6.1f} MB   slowest script {self.slowest_ms():6.1f} ms",
            flush=True,
        )

    def run(self, agent: Any, task: int, units: int) -> None:
        """One run, and its line."""
        began, cpu = time.perf_counter(), time.process_time()
        self.mesh.run(agent, task, timeout_s=300)
        self.say(f"{agent.name} {task}", units, time.perf_counter() - began, time.process_time() - cpu)

    def many(self, runs: int) -> None:
        """So many runs begun while no worker is there, looked at, and worked off."""

        async def begin() -> list[Any]:
            return [await self.mesh.begin(Leaf(), i) for i in range(runs)]

        before, began, cpu = self.used_mb(), time.perf_counter(), time.process_time()
        handles = run_sync(begin())
        self.say(f"{runs} runs begun", runs, time.perf_counter() - began, time.process_time() - cpu)
        each = (self.used_mb() - before) * 1e6 / runs
        print(f"    an open run is {each:.0f} bytes in Valkey; largest message {self.largest_message()} bytes")
        time.sleep(3.1)  # until nobody else is the sweeper
        for verb, look in (
            ("mesh.runs(50)", lambda: self.mesh.runs()),
            ("sweep", lambda: run_sync(runtime_of(self.mesh.app, self.mesh.crew.name).journal.sweep("bench"))),
        ):
            began = time.perf_counter()
            look()
            print(f"    {verb} with {runs} open: {(time.perf_counter() - began) * 1e3:.1f} ms")

        async def end() -> None:
            await asyncio.gather(*[h.result() for h in handles])

        with self.mesh.worker(concurrency=100):
            began, cpu = time.perf_counter(), time.process_time()
            run_sync(end())
            self.say(f"{runs} runs ended", runs, time.perf_counter() - began, time.process_time() - cpu)


def main() -> None:
    """Print a line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=["wide", "long", "value", "runs"])
    only = parser.parse_args().only
    print(machine())
    with valkey() as server:
        scene = Scene(server)
        with scene.mesh.worker(concurrency=100):
            if "wide" in only:
                for width in (500, 5000):
                    scene.run(Wide(), width, width)
                    scene.run(WideAgents(), width, width)
            if "long" in only:
                for steps in (200, 500, 1000, 2000):
                    scene.run(Long(), steps, steps)
            if "value" in only:
                scene.run(Value(), 10_000_000, 1)
        if "runs" in only:
            scene.many(10_000)
        scene.mesh.close()


if __name__ == "__main__":
    main()
