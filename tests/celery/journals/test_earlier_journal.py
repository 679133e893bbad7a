"""Runs that an earlier version left open in every state are read, and go on to their ends in a worker of today.

earlier_journal.json is all that the store held: each key as plain values, written by the code before steps described
themselves, by driving its engine over earlier_crew.py; some of the broker's messages are there too.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from agentmesh.config import Config
from agentmesh.journal.events import RunStarted
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import WorkerProcess

FOLDER = Path(__file__).parent
CREW = str(FOLDER / "earlier_crew.py")
STORE = json.loads((FOLDER / "earlier_journal.json").read_text())
ENDS: dict[str, Any] = {
    "queued": 6,
    "second": 6,
    "leased": 6,
    "refund": "refunded 7",
    "approved": "refunded 7",
    "approve": 2,
    "sleep": 4,
    "retry": 42,
    "gather": [0, 2, 4, 6, 8, 10],
    "closed": [0, 2, 4, 6, 8, 10],
    "children": ["approve: 42", "one: 42", "two: 42"],
    "mixed": [2, "three: 42", None, 8],  # four of five: the held refund is not waited for
    "child": "approve: 42",
    "unborn": "approve: 42",
    "ask": ["<hello>", "<again>"],
    "limited": ["<hello>", "<again>"],
    "doubt": "paid by hand",
    "cut~2": "paid by hand",
    "poison": 6,
    "again~2": [10, "done: 42", 2],
    "failed~2": [10, "done: 42", 2],
}
HOUR_MS = 3_600_000
APPROVE = ("refund", "approve", "children/1", "child/1", "unborn/1")


@pytest.fixture(params=["with its messages", "its messages lost"])
def mesh(request: pytest.FixtureRequest, valkey: Any) -> Iterator[Mesh]:
    """A mesh of today over what the earlier version left."""
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        for key, held in STORE["keys"].items():
            _write(client, key, held, with_messages=request.param == "with its messages")
    mesh = Mesh(load_crew(CREW), config=Config(broker=valkey.broker_url, journal=valkey.url, sweep_s=0.2))
    yield mesh
    mesh.close()


def _moved(key: str, member: str, score: float) -> float:
    """A time of the store. Ended runs would be past their retention by now, and the gather past its deadline."""
    now_ms = time.time() * 1000
    if key.endswith(":due") and member.startswith("g|"):
        return now_ms + HOUR_MS
    return now_ms if key.endswith(":forget") else score


def _write(client: Any, key: str, held: dict[str, Any], *, with_messages: bool) -> None:
    if "hash" in held:
        client.hset(key, mapping=held["hash"])
    elif "set" in held:
        client.sadd(key, *held["set"])
    elif "zset" in held:
        client.zadd(key, {member: _moved(key, member, score) for member, score in held["zset"]})
    elif not key.startswith("agentmesh.") or with_messages:
        client.rpush(key, *held["list"])


def test_every_open_run_goes_on(mesh: Mesh, eventually: Callable[..., None]) -> None:
    started = mesh.get("child/1").events()[0]
    assert isinstance(started, RunStarted)
    assert (started.agent, started.task, started.parent, started.parent_n) == ("Child", "approve", "child", 1)
    assert mesh.get("failed").retry().run_id == "failed~2"
    assert {"limited": "limit:turns", "doubt": "in_doubt", "poison": "quarantined", "mixed": "approve"}.items() <= {
        run_id: item.why for run_id in ENDS for item in mesh.get(run_id).waiting_for() if item.run_id.startswith(run_id)
    }.items()
    (refund,) = mesh.get("mixed").waiting_for()
    assert (refund.name, dict(refund.args)) == ("refund", {"order": 8})
    worker = WorkerProcess(CREW, mesh.config).start()
    try:
        for run_id in APPROVE:
            run = mesh.get(run_id)
            eventually(lambda run=run: run.waiting_for(), timeout_s=20)
            (item,) = (a for a in run.waiting_for() if a.why == "approve")
            run.approve(item, by="ana")
        for run_id in ("doubt", "cut~2"):
            run = mesh.get(run_id)
            eventually(lambda run=run: run.waiting_for(), timeout_s=20)
            (item,) = run.waiting_for()
            assert (item.name, item.why) == ("pay", "in_doubt")
            run.resolve(item, "done", value="paid by hand")
        (poison,) = mesh.get("poison").waiting_for()
        mesh.get("poison").revive(poison)
        for run_id in (
            "ask",
            "limited",
        ):  # the limit holds, also for a step whose entry and message are older than its lane
            run = mesh.get(run_id)
            eventually(lambda run=run: [a.why for a in run.waiting_for()] == ["limit:turns"], timeout_s=20)
            run.raise_limits({"turns": 5})
        ends = {run_id: mesh.get(run_id).result(timeout_s=60) for run_id in ENDS}
    finally:
        worker.kill()
        worker.join()
    assert ends == ENDS
