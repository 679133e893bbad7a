"""Waiting for a run's end and reading its tokens: a caller that leaves at any moment leaves nothing open."""

import asyncio
from typing import Any

import pytest

from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.run_spec import RunSpec
from agentmesh.journal.types import NewRun, NextSteps, TaskMessage


async def begun(url: str) -> RedisJournal:
    journal = RedisJournal(url)
    await journal.begin(NewRun("r", RunSpec(crew="c", agent="A"), TaskMessage("q", "advance|r|#", "")), NextSteps())
    return journal


async def is_left(task: "asyncio.Task[None]") -> bool:
    """Whether it ends when it is told to once."""
    task.cancel()
    await asyncio.wait([task], timeout=2)
    left = task.cancelled()
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.05)
    return left


@pytest.mark.parametrize("turns", range(6))
def test_a_watch_is_left_as_soon_as_the_channel_is_heard(valkey: Any, turns: int) -> None:
    async def leaves() -> bool:
        journal = await begun(valkey.url)
        watching = asyncio.create_task(journal.watch("r", version=None, timeout_s=30))
        while not (ends := list(journal._end_listeners.values())) or not ends[0]._subscribed.is_set():
            await asyncio.sleep(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        left = await is_left(watching)
        await journal.close()
        return left

    assert asyncio.run(leaves())


def test_a_live_stream_is_left_while_it_connects(valkey: Any) -> None:
    async def leaves(turns: int) -> bool:
        journal = await begun(valkey.url)

        async def listen() -> None:
            async for _ in journal.tokens("r"):
                pass

        listening = asyncio.create_task(listen())
        for _ in range(turns):
            await asyncio.sleep(0)
        left = await is_left(listening)
        await journal.close()
        return left

    assert [turns for turns in range(60) if not asyncio.run(leaves(turns))] == []
