"""The journal on a real Valkey, and what it does when the server, a script, a reply or the memory is gone."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import redis

from agentmesh.errors import JournalError, ServiceDown
from agentmesh.event import LimitRaised, RunDone, StepDone, StepPlanned, StepRetried
from agentmesh.journal import Swept
from agentmesh.journals.redis import RedisJournal
from agentmesh.ports import Accepted, Claimed, Next, Plan, Refused, RunSpec, Sent, Token, Wire, advance_unit, step_unit

MEBI = 1024 * 1024
LARGE = 64 * 1024
WORKER: dict[str, Any] = {"worker": "w", "crew": "c", "crew_version": ""}


def wire(unit: str) -> Wire:
    return Wire("q", f"{unit}#", "")


def spec(run_id: str, task: Any = "t") -> RunSpec:
    return RunSpec(run_id, "c", "", "A", task, wire=wire(advance_unit(run_id)))


def lone(run_id: str, n: int = 1) -> Next:
    return Next([Plan(StepPlanned(n=n, kind="Call", name="f", digest="d"), "queued", wire(step_unit(run_id, n)))])


def on(valkey: Any, story: Callable[[RedisJournal], Awaitable[Any]], **options: Any) -> Any:
    """The story told with a journal of its own, which is closed after it."""

    async def told() -> Any:
        journal = RedisJournal(valkey.url, **options)
        try:
            return await story(journal)
        finally:
            await journal.close()

    return asyncio.run(told())


async def whole_run(journal: RedisJournal, run_id: str, value: Any = 1) -> None:
    """One step, then the end; every verb of it may be asked for again at any time."""
    assert isinstance(await journal.begin(spec(run_id), lone(run_id)), Accepted)
    unit = step_unit(run_id, 1)
    claimed = await journal.claim(unit, token=run_id, version=0, **WORKER)
    assert isinstance(claimed, Claimed), claimed
    nxt = Next(end=RunDone(value=value))
    event = StepDone(n=1, value=value)
    done = await journal.commit(
        unit, fence=claimed.fence, event=event, version=claimed.version, next=nxt, charge={"turns": 1}
    )
    assert isinstance(done, Accepted), done
    assert not done.conflict


def client(valkey: Any) -> Any:
    return redis.Redis.from_url(valkey.url, decode_responses=True)


# ---- a run -------------------------------------------------------------------------------------
def test_a_run_is_kept_and_its_messages_are_pushed(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await whole_run(journal, "r")
        events = await journal.events("r")
        assert [type(e).__name__ for e in events] == ["RunStarted", "StepPlanned", "StepDone", "RunDone"]
        assert all(e.at_ms > 0 for e in events)
        assert await journal.events("r", after=-1) == events[-1:]
        head = await journal.head("r")
        assert head is not None
        assert (head.status, head.turns) == ("done", 1)
        assert await journal.runs() == [head]
        assert await journal.head("nobody") is None

    on(valkey, story)
    with client(valkey) as c:
        assert c.lrange("q", 0, -1) == ["s|r|1#1"]


def test_messages_for_another_broker_are_handed_over(valkey: Any) -> None:
    sent: list[Sent] = []
    on(valkey, lambda journal: whole_run(journal, "r"), push=False, send=sent.append)
    assert sent == [Sent("q", "s|r|1#1")]
    with client(valkey) as c:
        assert not c.exists("q")


def test_two_loops_of_one_journal_have_a_connection_each(valkey: Any) -> None:
    journal = RedisJournal(valkey.url)

    async def story(run_id: str) -> None:
        await whole_run(journal, run_id)
        await journal.close()

    threads = [threading.Thread(target=asyncio.run, args=(story(f"r{i}"),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def look() -> list[Any]:
        heads = await journal.runs()
        await journal.close()
        return heads

    assert sorted(head.id for head in asyncio.run(look())) == ["r0", "r1", "r2"]


def test_watchers_hear_of_an_end_and_of_something_new(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(spec("r"), lone("r"))
        ends = [asyncio.create_task(journal.watch("r", version=None, timeout_s=30)) for _ in range(50)]
        news = asyncio.create_task(journal.watch("r", version=2, timeout_s=30))
        await journal.watch("r", version=None, timeout_s=0.02)  # nothing has happened: the time is what ends it
        assert not any(task.done() for task in [*ends, news])
        await whole_run(journal, "r")
        async with asyncio.timeout(10):
            await asyncio.gather(*ends, news)
            await journal.watch("r", version=None, timeout_s=30)  # of one that has ended

    on(valkey, story)
    with client(valkey) as c:
        assert c.pubsub_numsub("agentmesh:ended") == [("agentmesh:ended", 0)]


def test_a_live_stream_ends_with_its_run(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> list[Token]:
        await journal.begin(spec("r"), lone("r"))

        async def listen() -> list[Token]:
            return [token async for token in journal.tokens("r")]

        heard = asyncio.create_task(listen())
        await journal.stream("r", [Token("r", 1, 1, "text", "a"), Token("r", 1, 1, "text", "b")])
        await journal.stream("r", [Token("r", 1, 1, "text", "c")])
        await whole_run(journal, "r")
        async with asyncio.timeout(10):
            return await heard

    assert "".join(token.text for token in on(valkey, story)) == "abc"


# ---- said twice --------------------------------------------------------------------------------
def test_a_turn_told_twice_is_told_once(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(spec("r"), lone("r"))
        unit = step_unit("r", 1)
        claimed = await journal.claim(unit, token="t", version=0, **WORKER)
        assert claimed == await journal.claim(unit, token="t", version=0, **WORKER)
        assert isinstance(claimed, Claimed)
        turn = StepRetried(n=1, attempt=1, error={"type": "X", "message": ""}, after_ms=0)
        for again in (False, True):
            answer = await journal.commit(unit, fence=claimed.fence, event=turn, charge={"tokens": 5})
            assert isinstance(answer, Accepted)
            assert answer.again is again
        head = await journal.head("r")
        assert head is not None
        assert head.tokens == 5
        assert len(await journal.events("r")) == 3
        second = await journal.claim(unit, token="u", version=0, **WORKER)
        assert isinstance(second, Claimed)
        assert second.attempt == 2

    on(valkey, story)


def test_a_limit_that_is_lifted_holds_nobody(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(replace(spec("r"), limits={"tokens": 10}), lone("r"))
        unit = step_unit("r", 1)
        first = await journal.claim(unit, token="t", version=0, ask=True, **WORKER)
        assert isinstance(first, Claimed)
        turn = StepRetried(n=1, attempt=1, error={"type": "X", "message": ""}, after_ms=0)
        await journal.commit(unit, fence=first.fence, event=turn, charge={"tokens": 10})
        refused = await journal.claim(unit, token="u", version=0, ask=True, **WORKER)
        assert isinstance(refused, Refused)
        assert [(held.key, held.why) for held in await journal.waiting("r")] == [("1", "limit:tokens")]
        assert isinstance(await journal.tell("r", LimitRaised(limits={"tokens": None})), Accepted)
        assert isinstance(await journal.claim(unit, token="v", version=0, ask=True, **WORKER), Claimed)

    on(valkey, story)


class Cutter:
    """Between client and server: forwards all, but throws away the n-th reply, with the connection."""

    def __init__(self, target: str, path: str, cut: set[int]) -> None:
        self.target, self.path, self.cut, self.seen = target, path, cut, 0

    async def serve(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self._pass, self.path)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up, out = await asyncio.open_unix_connection(self.target)
        try:
            while asked := await reader.read(MEBI):
                out.write(asked)
                self.seen += b"EVAL" in asked
                answer = await up.read(MEBI)
                if self.seen in self.cut and b"EVAL" in asked:
                    return
                writer.write(answer)
        finally:
            writer.close()
            out.close()


def test_a_lost_reply_changes_nothing(valkey: Any, tmp_path: Any) -> None:
    cutter = Cutter(str(valkey.socket), str(valkey.folder / "cut.sock"), {2, 4, 6})

    async def story() -> list[Any]:
        server = await cutter.serve()
        journal = RedisJournal(f"unix://{cutter.path}?db=0")
        await journal.sweep("w")
        await whole_run(journal, "r")
        await whole_run(journal, "s")
        events = [await journal.events(run) for run in "rs"]
        heads = await journal.runs()
        await journal.close()
        server.close()
        return [*events, *heads]

    first, second, *heads = asyncio.run(story())
    assert cutter.seen > max(cutter.cut)
    for events in (first, second):
        assert [type(e).__name__ for e in events] == ["RunStarted", "StepPlanned", "StepDone", "RunDone"]
    assert [(head.status, head.turns, head.refused) for head in heads] == [("done", 1, 0)] * 2


# ---- gone --------------------------------------------------------------------------------------
def test_scripts_that_the_server_forgot_are_sent_again(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await whole_run(journal, "r")
        with client(valkey) as c:
            c.script_flush()
        await asyncio.gather(*[whole_run(journal, f"s{i}") for i in range(20)])
        assert len(await journal.runs()) == 21

    on(valkey, story)


def test_a_server_killed_under_load_keeps_everything_it_answered(valkey: Any) -> None:
    def restart() -> None:
        valkey.kill()
        valkey.restart()

    async def story(journal: RedisJournal) -> None:
        tasks = [asyncio.create_task(whole_run(journal, f"r{i}")) for i in range(300)]
        for _ in range(3):
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.to_thread(restart)
        await asyncio.gather(*tasks)
        heads = await journal.runs(limit=1000)
        assert [(h.status, h.turns) for h in heads] == [("done", 1)] * 300

    on(valkey, story)


def test_watchers_hear_of_an_end_after_the_server_was_away(valkey: Any) -> None:
    def restart() -> None:
        valkey.kill()
        valkey.restart()

    async def story(journal: RedisJournal) -> None:
        async def ended() -> None:
            while (head := await journal.head("r")) is None or head.status == "open":
                await journal.watch("r", version=None, timeout_s=60)

        await journal.begin(spec("r"), lone("r"))
        waiting = [asyncio.create_task(ended()) for _ in range(10)]
        await journal.watch("r", version=None, timeout_s=0.02)  # by now they are listened for
        await asyncio.to_thread(restart)
        await whole_run(journal, "r")
        async with asyncio.timeout(20):
            await asyncio.gather(*waiting)

    on(valkey, story)


def test_a_sweep_sees_for_itself_that_a_message_is_lost(valkey: Any) -> None:
    now = 1_700_000_000_000

    async def story(journal: RedisJournal) -> None:
        nonlocal now

        async def after(ms: int) -> Swept:
            nonlocal now
            now += ms
            return await journal.sweep("w", look=True)

        with client(valkey) as broker:
            await journal.begin(spec("r"), lone("r"))
            assert [(await after(ms)).count for ms in (0, 700, 700, 700)] == [0] * 4  # the message waits
            assert broker.rpop("q") == "s|r|1#1"
            assert [await after(ms) for ms in (100, 900)] == [Swept(0), Swept(0)]
            assert (await after(100)).count == 1
            assert broker.rpop("q") == "s|r|1#2"
            now += 60_000  # nobody looks: who knows what was in it meanwhile
            assert [(await after(ms)).count for ms in (0, 900, 100)] == [0, 0, 1]

    on(valkey, story, clock=lambda: now)


def test_a_sweep_says_how_long_it_can_wait_and_leaves_its_turn_to_who_has_work(valkey: Any) -> None:
    now = 1_700_000_000_000

    async def story(journal: RedisJournal) -> None:
        nonlocal now
        assert await journal.sweep("w") == Swept(0, 2_000)
        assert await journal.sweep("v") == Swept(0, 2_000)
        await journal.begin(spec("r"), lone("r"))
        assert await journal.sweep("w") == Swept(0)
        assert await journal.sweep("v") == Swept(0, 3_000, mine=False)
        unit = step_unit("r", 1)
        claimed = await journal.claim(unit, token="t", version=0, **WORKER)
        assert isinstance(claimed, Claimed)
        assert await journal.sweep("w") == Swept(0)
        event = StepRetried(n=1, error={"type": "ToolError", "message": "no"}, after_ms=700)
        await journal.commit(unit, fence=claimed.fence, event=event)
        assert await journal.sweep("w") == Swept(0, 700)
        now += 700
        assert (await journal.sweep("v")).count == 1

    on(valkey, story, clock=lambda: now)


def test_no_lease_expires_for_one_term_after_the_server_was_away(valkey: Any) -> None:
    ttl_ms = 30_000

    async def story(journal: RedisJournal) -> None:
        await journal.begin(spec("r"), lone("r"))
        await journal.sweep("w")
        unit = step_unit("r", 1)
        assert isinstance(await journal.claim(unit, token="t", version=0, **WORKER), Claimed)
        with client(valkey) as c:
            c.zadd("agentmesh:leased", {unit: 1})  # long past
        valkey.kill()
        swept = asyncio.ensure_future(journal.sweep("w"))  # asked for while the server is away
        await asyncio.to_thread(valkey.restart)
        assert (await swept).count == 0
        refused = await journal.claim(unit, token="u", version=0, **WORKER)
        assert isinstance(refused, Refused)
        assert refused.why == "busy"
        with client(valkey) as c:
            c.hset("agentmesh:meta", "grace", 0)  # the term is over
        assert (await journal.sweep("w")).count == 1

    on(valkey, story, ttl_ms=ttl_ms)


def test_a_server_that_was_never_there_is_named(tmp_path: Any) -> None:
    async def story() -> None:
        journal = RedisJournal("redis://:secret@127.0.0.1:1/0", patience_s=0.05)
        with pytest.raises(ServiceDown, match=r"no journal answers at redis://127\.0\.0\.1:1/0") as caught:
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


def test_a_command_that_cannot_be_sent_fails_and_the_next_one_works(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        good = journal.pipe.ask("PING")
        with pytest.raises(TypeError):
            journal.pipe.ask("GET", object())
        assert await good == "PONG"
        with pytest.raises(JournalError, match="wrong number of arguments"):
            await journal.pipe.ask("GET")
        await whole_run(journal, "r")

    on(valkey, story)


def test_a_verb_without_memory_is_refused_whole(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(spec("r"), lone("r"))
        unit = step_unit("r", 1)
        with client(valkey) as c:
            try:
                c.config_set("maxmemory", 1)
                with pytest.raises(JournalError, match="out of memory"):
                    await journal.claim(unit, token="t", version=0, **WORKER)
                assert c.zrange("agentmesh:q:q", 0, -1) == [unit]
            finally:
                c.config_set("maxmemory", 0)
        await whole_run(journal, "r")

    on(valkey, story)


# ---- large values ------------------------------------------------------------------------------
def test_large_values_lie_beside_the_journal_and_die_with_their_run(valkey: Any) -> None:
    value, task = "x" * (10 * MEBI), {"text": "ü" * LARGE}

    async def story(journal: RedisJournal) -> None:
        assert isinstance(await journal.begin(spec("r", task), lone("r")), Accepted)
        unit = step_unit("r", 1)
        claimed = await journal.claim(unit, token="r", version=0, **WORKER)
        assert isinstance(claimed, Claimed)
        assert claimed.events[0].task == task  # type: ignore[attr-defined]
        await journal.commit(
            unit,
            fence=claimed.fence,
            event=StepDone(n=1, value=value),
            version=claimed.version,
            next=Next(end=RunDone(value=value)),
        )
        events = await journal.events("r")
        assert [getattr(e, "value", None) for e in events] == [None, None, value, value]

    async def forgotten(journal: RedisJournal) -> None:
        with client(valkey) as c:
            c.zadd("agentmesh:forget", {"r": 1})
        await journal.sweep("w")

    on(valkey, story)
    with client(valkey) as c:
        lines = c.lrange("agentmesh:ev:r", 0, -1)
        assert max(len(line) for line in lines) < LARGE
        assert len(c.smembers("agentmesh:blobs:r")) == 3
        assert max(len(text) for text in c.lrange("q", 0, -1)) < LARGE
        on(valkey, forgotten, retain_ms=1000)
        assert not [key for key in c.keys("agentmesh:*") if key.endswith(":r") or ":r:" in key]


@pytest.mark.parametrize("value", [{"blob": "a" * 64}, '"blob":"', {"e": "StepDone", "blob": "b" * 64}])
def test_a_users_own_blob_is_only_a_value(valkey: Any, value: Any) -> None:
    async def story(journal: RedisJournal) -> Any:
        await whole_run(journal, "r", value)
        return [getattr(e, "value", None) for e in await journal.events("r", after=2)]

    assert on(valkey, story) == [value, value]


def test_a_blob_deleted_by_hand_is_missed_by_name(valkey: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await whole_run(journal, "r", "x" * LARGE * 2)
        with client(valkey) as c:
            c.delete(*c.keys("agentmesh:blob:*"))
        with pytest.raises(JournalError, match="a large value of run r is gone"):
            await journal.events("r")

    on(valkey, story)


def test_texts_of_users_go_through_as_they_are(valkey: Any) -> None:
    value = {"\0": "\0 \\u0000 ü € 🦔 \n\r\t |/~", "n": [2**53 + 1, 1e300, -0.5, None, True, [], {}]}

    async def story(journal: RedisJournal) -> Any:
        await whole_run(journal, "r", value)
        return (await journal.events("r"))[2].value  # type: ignore[attr-defined]

    assert on(valkey, story) == value
    with client(valkey) as c:
        assert json.loads(c.lindex("agentmesh:ev:r", 2).partition(" ")[2])["value"] == value
