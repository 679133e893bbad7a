"""The journal on a real Valkey when the server, a script, a message or the memory is gone."""

import asyncio
from typing import Any

import pytest

from agentmesh.errors import JournalError, ServiceDown
from agentmesh.journal.events import StepRetried
from agentmesh.journal.journal import SweepResult
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.types import Claimed, Refused, step_unit


def restart(valkey: Any) -> None:
    valkey.kill()
    valkey.restart()


def test_scripts_that_the_server_forgot_are_sent_again(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journals.whole_run(journal, "r")
        with journals.client(valkey) as c:
            c.script_flush()
        await asyncio.gather(*[journals.whole_run(journal, f"s{i}") for i in range(20)])
        assert len(await journal.runs()) == 21

    journals.on(valkey, story)


def test_a_server_killed_under_load_keeps_everything_it_answered(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        tasks = [asyncio.create_task(journals.whole_run(journal, f"r{i}")) for i in range(300)]
        for _ in range(3):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.to_thread(restart, valkey)
        await asyncio.gather(*tasks)
        heads = await journal.runs(limit=1000)
        assert [(h.status, h.turns) for h in heads] == [("done", 1)] * 300

    journals.on(valkey, story)


def test_watchers_hear_of_an_end_after_the_server_was_away(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        async def ended() -> None:
            while (head := await journal.head("r")) is None or head.status == "open":
                await journal.watch("r", version=None, timeout_s=60)

        await journal.begin(journals.new_run("r"), journals.lone("r"))
        waiting = [asyncio.create_task(ended()) for _ in range(10)]
        await journal.watch("r", version=None, timeout_s=0.02)  # by now they are listened for
        await asyncio.to_thread(restart, valkey)
        await journals.whole_run(journal, "r")
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)

    journals.on(valkey, story)


def test_a_sweep_sees_for_itself_that_a_message_is_lost(valkey: Any, journals: Any) -> None:
    now = 1_700_000_000_000

    async def story(journal: RedisJournal) -> None:
        nonlocal now

        async def after(ms: int) -> SweepResult:
            nonlocal now
            now += ms
            return await journal.sweep("w", look=True)

        with journals.client(valkey) as broker:
            await journal.begin(journals.new_run("r"), journals.lone("r"))
            assert [(await after(ms)).count for ms in (0, 700, 700, 700)] == [0] * 4  # the message waits
            assert broker.rpop("q") == "s|r|1#1"
            assert [await after(ms) for ms in (100, 900)] == [SweepResult(0), SweepResult(0)]
            assert (await after(100)).count == 1
            assert broker.rpop("q") == "s|r|1#2"
            now += 60_000  # nobody looks: who knows what was in it meanwhile
            assert [(await after(ms)).count for ms in (0, 900, 100)] == [0, 0, 1]

    journals.on(valkey, story, clock=lambda: now)


def test_a_sweep_says_how_long_it_can_wait_and_leaves_its_turn_to_who_has_work(valkey: Any, journals: Any) -> None:
    now = 1_700_000_000_000

    async def story(journal: RedisJournal) -> None:
        nonlocal now
        assert await journal.sweep("w") == SweepResult(0, 2_000)
        assert await journal.sweep("v") == SweepResult(0, 2_000)
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        assert await journal.sweep("w") == SweepResult(0)
        assert await journal.sweep("v") == SweepResult(0, 3_000, mine=False)
        unit = step_unit("r", 1)
        claimed = await journal.claim(unit, token="t", version=0, **journals.WORKER)
        assert isinstance(claimed, Claimed)
        assert await journal.sweep("w") == SweepResult(0)
        event = StepRetried(n=1, error={"type": "ToolError", "message": "no"}, after_ms=700)
        await journal.commit(unit, fence=claimed.fence, event=event)
        assert await journal.sweep("w") == SweepResult(0, 700)
        now += 700
        assert (await journal.sweep("v")).count == 1

    journals.on(valkey, story, clock=lambda: now)


def test_no_lease_expires_for_one_term_after_the_server_was_away(valkey: Any, journals: Any) -> None:
    ttl_ms = 30_000

    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        await journal.sweep("w")
        unit = step_unit("r", 1)
        assert isinstance(await journal.claim(unit, token="t", version=0, **journals.WORKER), Claimed)
        with journals.client(valkey) as c:
            c.zadd("agentmesh:leased", {unit: 1})  # long past
        valkey.kill()
        swept = asyncio.ensure_future(journal.sweep("w"))  # asked for while the server is down
        await asyncio.to_thread(valkey.restart)
        assert (await swept).count == 0
        refused = await journal.claim(unit, token="u", version=0, **journals.WORKER)
        assert isinstance(refused, Refused)
        assert refused.why == "busy"
        with journals.client(valkey) as c:
            c.hset("agentmesh:meta", "grace", 0)  # the term is over
        assert (await journal.sweep("w")).count == 1

    journals.on(valkey, story, ttl_ms=ttl_ms)


def test_a_server_that_was_never_there_is_named(tmp_path: Any) -> None:
    async def story() -> None:
        journal = RedisJournal("redis://:secret@127.0.0.1:1/0", patience_s=0.05)
        with pytest.raises(ServiceDown, match=r"no journal server responds at redis://127\.0\.0\.1:1/0") as caught:
            await journal.head("r")
        assert "secret" not in str(caught.value)
        await journal.close()

    asyncio.run(story())


def test_a_closed_journal_leaves_nobody_waiting() -> None:
    async def story() -> None:
        journal = RedisJournal("redis://127.0.0.1:1/0")
        asked = asyncio.ensure_future(journal.head("r"))
        await asyncio.sleep(0)
        await journal.close()
        with pytest.raises(JournalError, match="was closed before it answered"):
            await asked

    asyncio.run(story())


def test_a_command_that_cannot_be_sent_fails_and_the_next_one_works(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        good = journal.connection.ask("PING")
        with pytest.raises(TypeError):
            journal.connection.ask("GET", object())
        assert await good == "PONG"
        with pytest.raises(JournalError, match="wrong number of arguments"):
            await journal.connection.ask("GET")
        await journals.whole_run(journal, "r")

    journals.on(valkey, story)


def test_a_verb_without_memory_is_refused_whole(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        unit = step_unit("r", 1)
        with journals.client(valkey) as c:
            try:
                c.config_set("maxmemory", 1)
                with pytest.raises(JournalError, match="out of memory"):
                    await journal.claim(unit, token="t", version=0, **journals.WORKER)
                assert c.zrange("agentmesh:q:q", 0, -1) == [unit]
            finally:
                c.config_set("maxmemory", 0)
        await journals.whole_run(journal, "r")

    journals.on(valkey, story)
