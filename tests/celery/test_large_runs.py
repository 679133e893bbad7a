"""Large work on one worker: a wide gather, a long run, a large value, many runs at once; no message above 64 KiB."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from agentmesh import Agent, Context, Crew, tool
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.registry import runtime_of
from agentmesh.config import Config
from agentmesh.mesh import Mesh

LONGEST_MESSAGE = 64 * 1024
SIZE = 10_000_000


@tool
async def plus(i: int) -> int:
    """Adds one."""
    return i + 1


@tool(max_output_bytes=2 * SIZE)
async def big() -> list[str]:
    """Ten megabytes."""
    return ["x" * 999] * (SIZE // 1000)


@tool
async def count(lines: list[str]) -> int:
    """How many characters."""
    return sum(map(len, lines))


class Wide(Agent[list[int]]):
    def flow(self, task: int, ctx: Context) -> list[int]:
        return ctx.gather([plus.on(i) for i in range(task)])


class Long(Agent[int]):
    def flow(self, task: int, ctx: Context) -> int:
        n = 0
        for _ in range(task):
            n = ctx.do(plus.on(n))
        return n


class Heavy(Agent[list[str]]):
    def flow(self, task: str, ctx: Context) -> list[str]:
        lines = ctx.do(big.on())
        ctx.do(count.on(lines))
        return lines


@pytest.fixture
def mesh(valkey: Any) -> Iterator[Mesh]:
    it = Mesh(Crew(Wide(), Long(), Heavy(), name="big"), config=Config(broker=valkey.broker_url, journal=valkey.url))
    yield it
    it.close()


def longest_message(valkey: Any) -> int:
    """Of those that the outbox keeps now."""
    with redis.Redis.from_url(valkey.url) as client:
        return max(len(text) for text in client.hvals("agentmesh:wires"))


def test_a_wide_gather_is_whole_and_in_order(mesh: Mesh) -> None:
    with mesh.worker():
        assert mesh.run(Wide(), 1500, timeout_s=60) == list(range(1, 1501))


def test_a_run_of_300_steps(mesh: Mesh) -> None:
    with mesh.worker():
        assert mesh.run(Long(), 300, timeout_s=60) == 300


def test_a_value_of_ten_megabytes_goes_through_and_stays_out_of_messages(mesh: Mesh, valkey: Any) -> None:
    with mesh.worker():
        assert sum(map(len, mesh.run(Heavy(), timeout_s=60))) == SIZE - SIZE // 1000
    with redis.Redis.from_url(valkey.url) as client:
        (journal,) = client.keys("agentmesh:ev:*")
        assert max(map(len, client.lrange(journal, 0, -1))) < LONGEST_MESSAGE


def test_a_thousand_runs_at_once_all_end(mesh: Mesh, valkey: Any) -> None:
    async def begin() -> list[Any]:
        return [await mesh.begin(Long(), i % 3 + 1) for i in range(1000)]

    async def results(runs: list[Any]) -> list[int]:
        await asyncio.gather(*[run.result() for run in runs])
        return [await run for run in runs]

    runs = run_sync(begin())
    assert 0 < longest_message(valkey) < LONGEST_MESSAGE
    with mesh.worker():
        assert run_sync(results(runs)) == [i % 3 + 1 for i in range(1000)]
    assert run_sync(runtime_of(mesh.app, mesh.crew.name).journal.counts()).open_runs == 0
