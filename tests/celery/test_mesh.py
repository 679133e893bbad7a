"""A mesh on a real Valkey: handles, versions, large values, canvases of messages, the broker's safety."""

import asyncio
import json
import threading
from typing import Any

import pytest
import redis
from celery import chord

from agentmesh import (
    Agent,
    ConfigError,
    Context,
    Crew,
    DefinitionError,
    DeviceQueue,
    MeshError,
    Queue,
    RunError,
    ServiceDown,
    Sleep,
    tool,
)
from agentmesh.celery.app import make_app
from agentmesh.celery.dispatch import Gather
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.publisher import publisher_for
from agentmesh.celery.registry import runtime_of
from agentmesh.config import Config
from agentmesh.journal.memory import MemoryJournal
from agentmesh.mesh import Mesh
from agentmesh.testing import ScriptedModel, says


class Echo(Agent):
    """Says what it is told."""


@tool
def repeat(text: str, times: int) -> str:
    """Repeats."""
    return text * times


class Big(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(repeat.on("x", 900_000))


class Wide(Agent[int]):
    def flow(self, task: int, ctx: Context) -> int:
        return len(ctx.gather([Echo().on(str(i)) for i in range(task)]))


class Sleeper(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        ctx.do(Sleep(0.3))
        return "awake"


def model() -> ScriptedModel:
    return ScriptedModel(lambda p: says(p.messages[-1].text))


def make(valkey: Any, *agents: Agent[Any, Any], **crew: Any) -> Mesh:
    return Mesh(Crew(*agents, **{"name": "m", "model": model(), **crew}), broker=valkey.broker_url, journal=valkey.url)


def test_a_handle(valkey: Any) -> None:
    mesh = make(valkey, Echo())
    with mesh.worker():
        run = mesh.start(Echo(), "hello there", run_id="h1", stream=True)
        assert "".join(run.tokens()).split() == ["hello", "there"]
        assert run.result(timeout_s=10) == "hello there"
        assert mesh.start(Echo(), "hello there", run_id="h1").result(timeout_s=10) == "hello there"
        with pytest.raises(RunError, match="exists with another agent or task"):
            mesh.start(Echo(), "another", run_id="h1")
        with pytest.raises(DefinitionError, match="'a/b' is not a run id; use 1 to 64 of"):
            mesh.start(Echo(), "x", run_id="a/b")
        assert [h.id for h in mesh.runs()] == ["h1"]

        async def from_a_loop() -> str:
            handle = await mesh.begin(Echo(), "x")
            seen = [type(e).__name__ async for _, e in handle.follow()]
            assert seen == ["RunStarted", "StepPlanned", "StepDone", "RunDone"]
            value = await handle
            await mesh.aio.close()  # this loop's connections; the mesh's own go with mesh.close()
            return value

        assert asyncio.run(from_a_loop()) == "x"
    mesh.close()


def test_a_run_that_does_not_exist(valkey: Any) -> None:
    mesh = make(valkey, Echo())
    with pytest.raises(RunError, match="there is no run 'nope'"):
        mesh.get("nope").result(timeout_s=1)
    mesh.close()


def test_wide_gathers_and_sleeps_hold_no_worker(valkey: Any) -> None:
    mesh = make(valkey, Wide(), Sleeper(), Echo(), queues=[Queue("main", concurrency=2)])
    with mesh.worker():
        sleeping = [mesh.start(Sleeper(), "x") for _ in range(10)]
        assert mesh.run(Wide(), 120, timeout_s=20) == 120
        assert [r.result(timeout_s=20) for r in sleeping] == ["awake"] * 10
    mesh.close()


def test_large_values_live_beside_the_journal(valkey: Any) -> None:
    mesh = make(valkey, Big())
    with mesh.worker():
        run = mesh.start(Big(), "y" * 200_000)
        assert run.result(timeout_s=20) == "x" * 900_000
        assert len(run.events()[0].task) == 200_000  # type: ignore[attr-defined]
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        lines = client.lrange(f"agentmesh:ev:{run.run_id}", 0, -1)
        assert max(map(len, lines)) < 1000  # type: ignore[arg-type]
        assert len(list(client.scan_iter("agentmesh:blob:*"))) >= 2
    mesh.close()


def test_a_run_of_another_version_waits_visibly(valkey: Any) -> None:
    old, new = make(valkey, Echo(), version="1"), make(valkey, Echo(), version="2")
    run = old.start(Echo(), "x")
    with new.worker():
        for _ in range(200):
            if run.waiting_for():
                break
            threading.Event().wait(0.02)
        assert [i.why for i in run.waiting_for()] == ["version:m 1"]
        assert run.status() == "open"
    with old.worker():
        assert run.result(timeout_s=20) == "x"
    old.close()
    new.close()


def test_a_gather_is_a_chord_and_its_messages_say_so(valkey: Any) -> None:
    mesh = make(valkey, Wide(), Echo())
    assert issubclass(Gather, chord)
    run = mesh.start(Wide(), 3, run_id="g1")
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        messages = [json.loads(m) for m in client.lrange("agentmesh.m.main", 0, -1)]  # type: ignore[union-attr]
        assert len(messages) == 3
        heads = sorted((m["headers"] for m in messages), key=lambda h: h["group_index"])
        assert [(h["task"], h["group"], h["group_index"]) for h in heads] == [
            ("agentmesh.advance", "g1:g1", i) for i in range(3)
        ]
        assert [h["shadow"] for h in heads] == ["Echo.delegate"] * 3
        assert all(not h.get("chord") and h["ignore_result"] for h in heads)
        assert {h["root_id"] for h in heads} == {"g1"}
        assert max(len(json.dumps(m)) for m in messages) < 2000
    with mesh.worker():
        assert run.result(timeout_s=10) == 3
    mesh.close()


def test_a_broker_that_evicts_is_refused(valkey: Any) -> None:
    mesh = make(valkey, Echo())
    with redis.Redis.from_url(valkey.url) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(ConfigError, match="would evict messages and journals"):
                mesh.check()
        finally:
            client.config_set("maxmemory-policy", "noeviction")
    mesh.close()


def test_a_broker_that_is_away_is_named() -> None:
    mesh = Mesh(Crew(Echo(), name="x"), broker="redis://127.0.0.1:1/0")
    with pytest.raises(ServiceDown, match="no broker responds at redis://127.0.0.1:1/0"):
        mesh.check()


def test_the_model_of_the_settings_is_asked_where_its_queue_is(valkey: Any) -> None:
    crew = Crew(Echo(), name="settings", queues=[Queue("main"), DeviceQueue("gpu", model="m")])
    config = Config(broker=valkey.broker_url, journal=valkey.url, model="local:m")
    mesh = Mesh(crew, config=config, models=lambda wanted: (model(), "m"))
    with mesh.worker(queues=["gpu"]):  # nobody serves `main`
        assert mesh.run(Echo(), "hello", timeout_s=10) == "hello"
    mesh.close()


def test_a_worker_that_stops_leaves_another_of_its_mesh_at_work(valkey: Any) -> None:
    running, over, times = threading.Event(), threading.Event(), list[int]()

    @tool(queue="beside")
    def slow(number: int) -> int:
        """Takes its time."""
        times.append(number)
        running.set()
        assert over.wait(30)
        return number

    class Slow(Agent[int]):
        def flow(self, task: str, ctx: Context) -> int:
            return ctx.do(slow.on(7))

    mesh = make(valkey, Slow(), queues=[Queue("main"), Queue("beside")])
    first = mesh.worker(queues=["main"]).start()
    with mesh.worker(queues=["beside"]):
        run = mesh.start(Slow(), "go")
        assert running.wait(10)
        first.stop()
        counts = run_sync(runtime_of(mesh.app, mesh.crew.name).journal.counts())
        assert (counts.leased, sum(counts.queues.values())) == (1, 0)
        assert runtime_of(mesh.app, mesh.crew.name).process_state.housekeeper is not None
        over.set()
        assert run.result(timeout_s=10) == 7
    assert times == [7]
    assert runtime_of(mesh.app, mesh.crew.name).process_state.housekeeper is None
    mesh.close()


def test_two_workers_of_one_mesh_leave_no_thread_behind(valkey: Any) -> None:
    mesh = make(valkey, Echo(), queues=[Queue("main"), Queue("beside")])
    before = set(threading.enumerate())

    def tenders() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t not in before and t.name == "agentmesh-housekeeping"]

    with mesh.worker(queues=["main"]), mesh.worker(queues=["beside"]):
        assert mesh.run(Echo(), "hello", timeout_s=10) == "hello"
        assert len(tenders()) == 2
    assert not tenders()
    mesh.close()


def test_a_journal_object_in_the_place_of_a_url(valkey: Any) -> None:
    crew = Crew(Wide(), Sleeper(), Echo(), name="own", model=model())
    app = make_app(valkey.broker_url)
    journal = MemoryJournal(send=publisher_for(app))
    mesh = Mesh(crew, app=app, journal=journal)
    with mesh.worker():
        assert mesh.run(Wide(), 12, timeout_s=20) == 12
        run = mesh.start(Sleeper(), "x")
        assert run.result(timeout_s=20) == "awake"
    assert [head.id for head in asyncio.run(journal.runs())][:1] == [run.run_id]
    with redis.Redis.from_url(valkey.url) as client:
        assert not client.keys("agentmesh:*")  # nothing of the journal is on the broker's server
    mesh.close()


def test_a_program_on_an_event_loop_awaits_everything(valkey: Any) -> None:
    mesh = make(valkey, Echo(), Sleeper())

    async def program() -> list[Any]:
        await mesh.aio.check()
        async with mesh.worker():
            run = await mesh.begin(Echo(), "one two", stream=True)
            texts = [text async for text in run.tokens()]
            with pytest.raises(MeshError, match=r"write `await mesh\.begin\(…\)`"):
                mesh.start(Echo(), "x")
            answers = await asyncio.gather(*[mesh.aio.run(Sleeper(), "x") for _ in range(3)])
            heads = await mesh.aio.runs()
            same = await mesh.aio.get(run.run_id).result()
        await mesh.aio.close()
        return [texts, answers, len(heads), same]

    assert asyncio.run(program()) == [["one", " two"], ["awake"] * 3, 4, "one two"]
    mesh.close()


def test_a_mesh_without_a_broker_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTMESH_BROKER", raising=False)
    with pytest.raises(ConfigError, match="no broker is named; set AGENTMESH_BROKER"):
        Mesh(Crew(Echo()))
