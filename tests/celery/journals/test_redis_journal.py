"""The journal on a real Valkey: a run in it, verbs that are said twice, large values."""

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import pytest

from agentmesh.errors import JournalError
from agentmesh.journal.events import LimitRaised, RunDone, StepDone, StepRetried
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.types import Accepted, Claimed, NextSteps, OutboxMessage, Refused, Token, step_unit

MEBI = 1024 * 1024
LARGE = 64 * 1024


# ---- a run -------------------------------------------------------------------------------------
def test_a_run_is_kept_and_its_messages_are_pushed(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journals.whole_run(journal, "r")
        events = await journal.events("r")
        assert [type(e).__name__ for e in events] == ["RunStarted", "StepPlanned", "StepDone", "RunDone"]
        assert all(e.at_ms > 0 for e in events)
        assert await journal.events("r", after=-1) == events[-1:]
        head = await journal.head("r")
        assert head is not None
        assert (head.status, head.turns) == ("done", 1)
        assert await journal.runs() == [head]
        assert await journal.head("nobody") is None

    journals.on(valkey, story)
    with journals.client(valkey) as c:
        assert c.lrange("q", 0, -1) == ["s|r|1#1"]


def test_messages_for_another_broker_are_handed_over(valkey: Any, journals: Any) -> None:
    sent: list[OutboxMessage] = []
    journals.on(valkey, lambda journal: journals.whole_run(journal, "r"), push=False, send=sent.append)
    assert sent == [OutboxMessage("q", "s|r|1#1")]
    with journals.client(valkey) as c:
        assert not c.exists("q")


def test_two_loops_of_one_journal_have_a_connection_each(valkey: Any, journals: Any) -> None:
    journal = RedisJournal(valkey.url)

    async def story(run_id: str) -> None:
        await journals.whole_run(journal, run_id)
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


def test_watchers_hear_of_an_end_and_of_something_new(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        ends = [asyncio.create_task(journal.watch("r", version=None, timeout_s=30)) for _ in range(50)]
        news = asyncio.create_task(journal.watch("r", version=2, timeout_s=30))
        await journal.watch("r", version=None, timeout_s=0.02)  # nothing has happened: the time is what ends it
        assert not any(task.done() for task in [*ends, news])
        await journals.whole_run(journal, "r")
        async with asyncio.timeout(10):
            await asyncio.gather(*ends, news)
            await journal.watch("r", version=None, timeout_s=30)  # of one that has ended

    journals.on(valkey, story)
    with journals.client(valkey) as c:
        assert c.pubsub_numsub("agentmesh:ended") == [("agentmesh:ended", 0)]


def test_a_live_stream_ends_with_its_run(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> list[Token]:
        await journal.begin(journals.new_run("r"), journals.lone("r"))

        async def listen() -> list[Token]:
            return [token async for token in journal.tokens("r")]

        heard = asyncio.create_task(listen())
        await journal.stream("r", [Token("r", 1, 1, "text", "a"), Token("r", 1, 1, "text", "b")])
        await journal.stream("r", [Token("r", 1, 1, "text", "c")])
        await journals.whole_run(journal, "r")
        async with asyncio.timeout(10):
            return await heard

    assert "".join(token.text for token in journals.on(valkey, story)) == "abc"


# ---- said twice --------------------------------------------------------------------------------
def test_a_turn_told_twice_is_told_once(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        unit = step_unit("r", 1)
        claimed = await journal.claim(unit, token="t", version=0, **journals.WORKER)
        assert claimed == await journal.claim(unit, token="t", version=0, **journals.WORKER)
        assert isinstance(claimed, Claimed)
        turn = StepRetried(n=1, attempt=1, error={"type": "X", "message": ""}, after_ms=0)
        for again in (False, True):
            answer = await journal.commit(unit, fence=claimed.fence, event=turn, charge={"tokens": 5})
            assert isinstance(answer, Accepted)
            assert answer.is_repeat is again
        head = await journal.head("r")
        assert head is not None
        assert head.tokens == 5
        assert len(await journal.events("r")) == 3
        second = await journal.claim(unit, token="u", version=0, **journals.WORKER)
        assert isinstance(second, Claimed)
        assert second.attempt == 2

    journals.on(valkey, story)


def test_a_limit_that_is_lifted_holds_nobody(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        new = journals.new_run("r")
        (asking,) = journals.lone("r").plans
        new = replace(new, spec=replace(new.spec, limits={"tokens": 10}))
        await journal.begin(new, NextSteps([replace(asking, limited=True)]))
        unit = step_unit("r", 1)
        first = await journal.claim(unit, token="t", version=0, **journals.WORKER)
        assert isinstance(first, Claimed)
        turn = StepRetried(n=1, attempt=1, error={"type": "X", "message": ""}, after_ms=0)
        await journal.commit(unit, fence=first.fence, event=turn, charge={"tokens": 10})
        refused = await journal.claim(unit, token="u", version=0, **journals.WORKER)
        assert isinstance(refused, Refused)
        assert [(held.key, held.why) for held in (await journal.open_entries("r")).waiting] == [("1", "limit:tokens")]
        assert isinstance(await journal.signal("r", LimitRaised(limits={"tokens": None})), Accepted)
        assert isinstance(await journal.claim(unit, token="v", version=0, **journals.WORKER), Claimed)

    journals.on(valkey, story)


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


def test_a_lost_reply_changes_nothing(valkey: Any, tmp_path: Any, journals: Any) -> None:
    cutter = Cutter(str(valkey.socket), str(valkey.folder / "cut.sock"), {2, 4, 6})

    async def story() -> list[Any]:
        server = await cutter.serve()
        journal = RedisJournal(f"unix://{cutter.path}?db=0")
        await journal.sweep("w")
        await journals.whole_run(journal, "r")
        await journals.whole_run(journal, "s")
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


# ---- large values ------------------------------------------------------------------------------
def test_large_values_lie_beside_the_journal_and_die_with_their_run(valkey: Any, journals: Any) -> None:
    value, task = "x" * (10 * MEBI), {"text": "ü" * LARGE}

    async def story(journal: RedisJournal) -> None:
        assert isinstance(await journal.begin(journals.new_run("r", task), journals.lone("r")), Accepted)
        unit = step_unit("r", 1)
        claimed = await journal.claim(unit, token="r", version=0, **journals.WORKER)
        assert isinstance(claimed, Claimed)
        assert claimed.events[0].task == task  # type: ignore[attr-defined]
        await journal.commit(
            unit,
            fence=claimed.fence,
            event=StepDone(n=1, value=value),
            version=claimed.version,
            next=NextSteps(end=RunDone(value=value)),
        )
        events = await journal.events("r")
        assert [getattr(e, "value", None) for e in events] == [None, None, value, value]

    async def forgotten(journal: RedisJournal) -> None:
        with journals.client(valkey) as c:
            c.zadd("agentmesh:forget", {"r": 1})
        await journal.sweep("w")

    journals.on(valkey, story)
    with journals.client(valkey) as c:
        lines = c.lrange("agentmesh:ev:r", 0, -1)
        assert max(len(line) for line in lines) < LARGE
        assert len(c.smembers("agentmesh:blobs:r")) == 3
        assert max(len(text) for text in c.lrange("q", 0, -1)) < LARGE
        journals.on(valkey, forgotten, retain_ms=1000)
        assert not [key for key in c.keys("agentmesh:*") if key.endswith(":r") or ":r:" in key]


@pytest.mark.parametrize("value", [{"blob": "a" * 64}, '"blob":"', {"e": "StepDone", "blob": "b" * 64}])
def test_a_users_own_blob_is_only_a_value(valkey: Any, value: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> Any:
        await journals.whole_run(journal, "r", value)
        return [getattr(e, "value", None) for e in await journal.events("r", after=2)]

    assert journals.on(valkey, story) == [value, value]


def test_a_blob_deleted_by_hand_is_missed_by_name(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journals.whole_run(journal, "r", "x" * LARGE * 2)
        with journals.client(valkey) as c:
            c.delete(*c.keys("agentmesh:blob:*"))
        with pytest.raises(JournalError, match="a large value of run r is missing"):
            await journal.events("r")

    journals.on(valkey, story)


def test_texts_of_users_go_through_as_they_are(valkey: Any, journals: Any) -> None:
    value = {"\0": "\0 \\u0000 ü € 🦔 \n\r\t |/~", "n": [2**53 + 1, 1e300, -0.5, None, True, [], {}]}

    async def story(journal: RedisJournal) -> Any:
        await journals.whole_run(journal, "r", value)
        return (await journal.events("r"))[2].value  # type: ignore[attr-defined]

    assert journals.on(valkey, story) == value
    with journals.client(valkey) as c:
        assert json.loads(c.lindex("agentmesh:ev:r", 2).partition(" ")[2])["value"] == value
