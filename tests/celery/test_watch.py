"""Waiting for a run's end and reading its tokens: a caller that leaves at any moment leaves nothing open."""

import asyncio
import gc
import time
from typing import Any

import pytest

from agentmesh.journal import run_end_listener
from agentmesh.journal.events import RunCancelled
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


def test_a_subscription_that_nobody_uses_ends_and_the_next_who_waits_has_another(
    valkey: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_end_listener, "IDLE_S", 0.5)

    async def waits_twice() -> float:
        journal = await begun(valkey.url)
        for _ in range(2):
            await journal.watch("r", version=None, timeout_s=0.05)
            (ends,) = journal._end_listeners.values()
            assert ends._task is not None
            async with asyncio.timeout(5):
                await ends._task
        watching = asyncio.create_task(journal.watch("r", version=None, timeout_s=30))
        await asyncio.sleep(1.2)  # longer than an idle subscription lasts
        await journal.signal("r", RunCancelled())
        began_s = time.monotonic()
        await watching
        await journal.close()
        return time.monotonic() - began_s

    assert asyncio.run(waits_twice()) < run_end_listener.IDLE_S + 1


@pytest.mark.parametrize("use", ["watch", "tokens"])
def test_a_journal_that_is_forgotten_open_leaves_no_pending_task(
    valkey: Any, use: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_end_listener, "IDLE_S", 0.2)

    async def forgets() -> None:
        journal = await begun(valkey.url)
        if use == "watch":
            await journal.watch("r", version=None, timeout_s=0.05)
        else:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    async for _ in journal.tokens("r"):
                        pass

    async def program() -> int:
        await forgets()
        gc.collect()
        async with asyncio.timeout(5):
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0.05)
        return len(asyncio.all_tasks())

    assert asyncio.run(program()) == 1
    assert not [r.getMessage() for r in caplog.records if "destroyed" in r.getMessage()]
