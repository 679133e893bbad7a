"""Scenarios with a journal on a real Valkey, and the pure protocol compared with its scripts, verb by verb."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import redis
from redis.exceptions import NoScriptError

from agentmesh.journal import maintenance
from agentmesh.journal.events import RunDone, StepDone, StepPlanned
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.run_spec import RunSpec
from agentmesh.journal.scripts import script
from agentmesh.journal.transaction import Tables, Transaction
from agentmesh.journal.types import (
    Accepted,
    Claimed,
    NewRun,
    NextSteps,
    StepPlan,
    TaskMessage,
    advance_unit,
    step_unit,
)


class Journals:
    """Makes journals on a Valkey, and what their verbs are asked with."""

    WORKER: dict[str, Any] = {"worker": "w", "crew": "c", "crew_version": ""}

    @staticmethod
    def wire(unit: str) -> TaskMessage:
        return TaskMessage("q", f"{unit}#", "")

    def new_run(self, run_id: str, task: Any = "t") -> NewRun:
        return NewRun(run_id, RunSpec(crew="c", agent="A", task=task), self.wire(advance_unit(run_id)))

    def lone(self, run_id: str, n: int = 1) -> NextSteps:
        return NextSteps(
            [StepPlan(StepPlanned(n=n, kind="Call", name="f", digest="d"), "queued", self.wire(step_unit(run_id, n)))]
        )

    @staticmethod
    def on(valkey: Any, story: Callable[[RedisJournal], Awaitable[Any]], **options: Any) -> Any:
        """The story told with a journal of its own, which is closed after it."""

        async def told() -> Any:
            journal = RedisJournal(valkey.url, **options)
            try:
                return await story(journal)
            finally:
                await journal.close()

        return asyncio.run(told())

    async def whole_run(self, journal: RedisJournal, run_id: str, value: Any = 1) -> None:
        """One step, then the end; every verb of it may be asked for again at any time."""
        assert isinstance(await journal.begin(self.new_run(run_id), self.lone(run_id)), Accepted)
        unit = step_unit(run_id, 1)
        claimed = await journal.claim(unit, token=run_id, version=0, **self.WORKER)
        assert isinstance(claimed, Claimed), claimed
        nxt = NextSteps(end=RunDone(value=value))
        event = StepDone(n=1, value=value)
        done = await journal.commit(
            unit, fence=claimed.fence, event=event, version=claimed.version, next=nxt, charge={"turns": 1}
        )
        assert isinstance(done, Accepted), done
        assert not done.conflict

    @staticmethod
    def client(valkey: Any) -> Any:
        return redis.Redis.from_url(valkey.url, decode_responses=True)


@pytest.fixture
def journals() -> Journals:
    """`journals.on(valkey, story)` tells a story with a journal of its own."""
    return Journals()


class Alike:
    """The pure functions and the scripts on a server: what is asked of the ones is asked of the others."""

    brokers = ("p", "q", "p.suspects", "q.suspects")  # lists of messages, in the same store
    _prefix = "diff:"

    def __init__(self, client: Any) -> None:
        self.client = client

    def both(
        self, tables: Tables, now: int, name: str, args: dict[str, Any], *, seed: int
    ) -> tuple[tuple[dict[str, Any], list[str]], list[str]]:
        """The reply of both, and the units for which both sent messages."""
        store = Transaction(tables, now)
        head, lines = maintenance.ALL_VERBS[name](store, args)
        text, sha = script(name)
        given = (1, self._prefix, json.dumps(args), str(now), "0")
        try:
            reply = self.client.evalsha(sha, *given)
        except NoScriptError:
            reply = self.client.eval(text, *given)
        told, count = json.loads(reply[0]), reply[1]
        assert (told, reply[2 : 2 + count]) == (head, lines), f"seed {seed}, {now} ms: {name}({args})"
        sent = list(zip(reply[2 + count :: 2], reply[3 + count :: 2], strict=True))
        assert sent == [(queue, f"{h}{seq}{t}") for queue, h, seq, t in store.sent], (
            f"seed {seed}, {now} ms: {name}({args})"
        )
        return (head, lines), [text.rstrip("#") for _, text, _, _ in store.sent]

    def compare(self, tables: Tables) -> None:
        """Everything that is kept."""
        for key, events in tables.lists.items():
            if key in self.brokers:
                continue
            assert self.client.lrange(self._prefix + key, 0, -1) == events, key
        for key, members in tables.zsets.items():
            found = {m: int(s) for m, s in self.client.zrange(self._prefix + key, 0, -1, withscores=True)}
            assert found == members, key
        for key, names in tables.sets.items():
            assert self.client.smembers(self._prefix + key) == names, key
        for key, fields in tables.hashes.items():
            kept = {name: _plain(value) for name, value in self.client.hgetall(self._prefix + key).items()}
            assert kept == {name: _plain(value) for name, value in fields.items()}, key

    @staticmethod
    def wire(unit: str, queue: str) -> str:
        return f"{queue}\0{unit}#\0"

    def spec(self, run: str) -> dict[str, Any]:
        return {"crew": "c", "version": "", "agent": "A", "wire": self.wire(f"a|{run}", "q")}


def _plain(value: Any) -> Any:
    """A field as a value: the scripts keep records as JSON and numbers as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, str) and value.startswith("{"):
        return _plain(json.loads(value))
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@pytest.fixture
def alike(valkey: Any) -> Iterator[Alike]:
    """On an empty server."""
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        yield Alike(client)
