"""Live streams of many readers over one connection: nothing missed, nothing twice, whenever a reader comes or goes."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from agentmesh.journal import streams
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.types import Token


def token(run: str, text: str) -> Token:
    return Token(run, 1, 1, "text", text)


async def heard(journal: RedisJournal, run: str, sink: list[str] | None = None) -> list[str]:
    """All that a reader of the run's stream gets until the run ends."""
    texts = [] if sink is None else sink
    async for said in journal.tokens(run):
        texts.append(said.text)
    return texts


async def until(what: Callable[[], Any], timeout_s: float = 10) -> None:
    async with asyncio.timeout(timeout_s):
        while not what():
            await asyncio.sleep(0.002)


def connections(client: Any, command: str) -> int:
    """How many connections of the server stand in this command."""
    return sum(entry["cmd"] == command for entry in client.client_list())


def test_two_hundred_readers_are_one_connection(valkey: Any, journals: Any) -> None:
    """Of one stream each or of the same; the others of the process are the journal's own and one that hears of ends."""

    async def story(journal: RedisJournal) -> None:
        for i in range(100):
            await journal.begin(journals.new_run(f"r{i}"), journals.lone(f"r{i}"))
        sinks = [list[str]() for _ in range(200)]
        readers = [asyncio.create_task(heard(journal, f"r{i // 2}", sinks[i])) for i in range(200)]
        with journals.client(valkey) as client:
            before = client.info("clients")["connected_clients"]
            for word in range(3):
                for i in range(100):
                    await journal.stream(f"r{i}", [token(f"r{i}", str(word))])
                await until(lambda n=word + 1: all(len(sink) == n for sink in sinks))
            await asyncio.sleep(0.05)
            assert connections(client, "xread") == 1
            assert client.info("clients")["connected_clients"] - before <= 3
            for i in range(100):
                await journals.whole_run(journal, f"r{i}")
            async with asyncio.timeout(20):
                assert await asyncio.gather(*readers) == [["0", "1", "2"]] * 200
            await until(lambda: connections(client, "xread") == 0)

    journals.on(valkey, story)


def test_a_token_is_heard_soon(valkey: Any, journals: Any) -> None:
    """Also by a reader whose stream the read under way did not know yet: it is interrupted."""

    async def story(journal: RedisJournal) -> float:
        lags = []
        readers = []
        for i in range(8):
            await journal.begin(journals.new_run(f"r{i}"), journals.lone(f"r{i}"))
            sink: list[str] = []
            readers.append(asyncio.create_task(heard(journal, f"r{i}", sink)))
            await asyncio.sleep(0.05)  # the read blocks again
            began = time.monotonic()
            await journal.stream(f"r{i}", [token(f"r{i}", "a")])
            await until(lambda sink=sink: sink)
            lags.append(time.monotonic() - began)
        for reader in readers:
            reader.cancel()
        return sorted(lags)[4]

    assert journals.on(valkey, story) < 0.25  # a read that nobody interrupts blocks for two seconds


def test_a_reader_that_comes_late_gets_all_of_it(valkey: Any, journals: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "ENTRIES_PER_READ", 7)

    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        sinks = [list[str](), list[str](), list[str]()]
        readers = [asyncio.create_task(heard(journal, "r", sinks[0]))]
        for i in range(100):
            await journal.stream("r", [token("r", str(i))])
            if i in (30, 60):
                readers.append(asyncio.create_task(heard(journal, "r", sinks[len(readers)])))
        await until(lambda: all(len(sink) == 100 for sink in sinks))
        await journals.whole_run(journal, "r")
        readers.append(asyncio.create_task(heard(journal, "r")))  # after the end
        async with asyncio.timeout(20):
            assert await asyncio.gather(*readers) == [[str(i) for i in range(100)]] * 4
            assert await heard(journal, "nobody") == []

    journals.on(valkey, story)


def test_a_stream_that_is_left_and_joined_again_is_read_from_its_beginning(valkey: Any, journals: Any) -> None:
    """The read under way still asks for what comes after the reader that has left."""

    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        for _ in range(5):
            sink: list[str] = []
            first = asyncio.create_task(heard(journal, "r", sink))
            await journal.stream("r", [token("r", "x")])
            await until(lambda sink=sink: sink)
            listener = journal._streams
            await until(lambda: listener._is_blocked)
            first.cancel()
            await asyncio.wait([first])
            await until(lambda: not listener._readers)
            again: list[str] = []
            second = asyncio.create_task(heard(journal, "r", again))
            await journal.stream("r", [token("r", "y")])
            await until(lambda again=again: again[-1:] == ["y"])
            assert again[0] == "x"
            assert again == [said async for said in _all(journal)]
            second.cancel()

    async def _all(journal: RedisJournal) -> Any:
        for _, fields in await journal.connection.ask("XRANGE", "agentmesh:live:r", "-", "+"):
            for said in json.loads(fields[1]):
                yield said[-1]

    journals.on(valkey, story)


@pytest.mark.parametrize("seed", range(6))
def test_readers_that_come_and_go_at_random(valkey: Any, journals: Any, seed: int, monkeypatch: Any) -> None:
    """Slow ones too, whose part of the read is full."""
    monkeypatch.setattr(streams, "MAX_PENDING", 3)
    monkeypatch.setattr(streams, "ENTRIES_PER_READ", 4)
    rng = random.Random(seed)

    async def read(journal: RedisJournal, run: str) -> tuple[str, bool, list[str]]:
        texts: list[str] = []
        await asyncio.sleep(rng.uniform(0, 0.3))
        leaves = rng.choice([None, None, rng.randint(1, 40)])
        async for said in journal.tokens(run):
            texts.append(said.text)
            if rng.random() < 0.2:
                await asyncio.sleep(rng.uniform(0, 0.02))
            if leaves is not None and len(texts) >= leaves:
                return run, False, texts
        return run, True, texts

    async def write(journal: RedisJournal, run: str) -> None:
        for i in range(60):
            await journal.stream(run, [token(run, str(i))])
            await asyncio.sleep(rng.choice([0, 0, 0.005]))
        await journals.whole_run(journal, run)

    async def story(journal: RedisJournal) -> None:
        runs = ["a", "b", "c"]
        for run in runs:
            await journal.begin(journals.new_run(run), journals.lone(run))
        readers = [asyncio.create_task(read(journal, rng.choice(runs))) for _ in range(20)]
        async with asyncio.timeout(30):
            await asyncio.gather(*[write(journal, run) for run in runs])
            results = await asyncio.gather(*readers)
        for _, whole, texts in results:
            assert texts == [str(i) for i in range(60 if whole else len(texts))]

    journals.on(valkey, story)


def test_a_server_that_restarts_in_the_middle(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        sinks = [list[str](), list[str]()]
        readers = [asyncio.create_task(heard(journal, "r", sink)) for sink in sinks]
        await journal.stream("r", [token("r", "a")])
        await until(lambda: all(sinks))
        valkey.kill()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(valkey.restart)
        await journal.stream("r", [token("r", "b")])
        await until(lambda: all(len(sink) == 2 for sink in sinks))
        await journals.whole_run(journal, "r")
        async with asyncio.timeout(20):
            assert await asyncio.gather(*readers) == [["a", "b"]] * 2

    journals.on(valkey, story)


def test_a_loop_that_is_closed_while_it_reads_leaves_others_reading(valkey: Any, journals: Any) -> None:
    journal = RedisJournal(valkey.url)
    sink: list[str] = []
    loop = asyncio.new_event_loop()

    def read_elsewhere() -> None:
        asyncio.set_event_loop(loop)
        reading = loop.create_task(heard(journal, "r", sink))
        loop.run_forever()
        reading.cancel()
        loop.run_until_complete(asyncio.gather(reading, return_exceptions=True))
        for task in asyncio.all_tasks(loop):
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()

    async def story(_: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        thread = threading.Thread(target=read_elsewhere)
        thread.start()
        reader = asyncio.create_task(heard(journal, "r"))
        await journal.stream("r", [token("r", "a")])
        await until(lambda: sink)
        loop.call_soon_threadsafe(loop.stop)
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
        await journal.stream("r", [token("r", "b")])
        await journals.whole_run(journal, "r")
        async with asyncio.timeout(10):
            assert await reader == ["a", "b"]
        await journal.close()

    journals.on(valkey, story)
    assert sink == ["a"]
    with journals.client(valkey) as client:
        assert connections(client, "xread") == 0


def test_a_user_who_may_not_unblock_hears_a_new_stream_a_little_later(valkey: Any, journals: Any) -> None:
    with journals.client(valkey) as client:
        client.execute_command(
            "ACL", "SETUSER", "plain", "on", ">pw", "~*", "&*", "+@all", "-client|unblock", "-client|id"
        )
    url = valkey.url.replace("unix://", "unix://plain:pw@")

    async def story(_: RedisJournal) -> None:
        journal = RedisJournal(url)
        sinks = [list[str](), list[str]()]
        readers = []
        for i, sink in enumerate(sinks):
            await journal.begin(journals.new_run(f"r{i}"), journals.lone(f"r{i}"))
            readers.append(asyncio.create_task(heard(journal, f"r{i}", sink)))
            await asyncio.sleep(0.05)
            await journal.stream(f"r{i}", [token(f"r{i}", "a")])
        await until(lambda: all(sinks), 1.5)
        for reader in readers:
            reader.cancel()
        await journal.close()

    journals.on(valkey, story)


def test_a_stream_that_cannot_be_read_says_so(valkey: Any, journals: Any) -> None:
    async def story(journal: RedisJournal) -> None:
        await journal.begin(journals.new_run("r"), journals.lone("r"))
        with journals.client(valkey) as client:
            client.set("agentmesh:live:r", "not a stream")
        with pytest.raises(Exception, match="WRONGTYPE"):
            async with asyncio.timeout(5):
                await heard(journal, "r")

    journals.on(valkey, story)
