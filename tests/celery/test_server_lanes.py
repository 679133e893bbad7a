"""Lanes in front of model servers: real worker processes, a real broker, servers that count requests by lane."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from kombu.transport.pyamqp import Message as BrokerMessage

from agentmesh import Agent, Crew, DefinitionError, Queue, ServerQueue
from agentmesh.celery import rabbitmq_consumer
from agentmesh.celery.embedded import EmbeddedWorker, InProcessWorker
from agentmesh.celery.rabbitmq import inspect_broker
from agentmesh.celery.registry import runtime_of
from agentmesh.config import Config
from agentmesh.journal.events import StepDone
from agentmesh.mesh import Mesh
from agentmesh.message import Message
from agentmesh.model import Answer, Prompt
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeOpenAI, Host
from agentmesh.testing.fake_openai import Fault

CREW = str(Path(__file__).parent / "lanes_crew.py")
PLACES, LATENCY_S, MANY = 4, 0.05, 120
Eventually = Callable[..., None]


class Servers:
    """Two servers, who asked them in what order, and how many at once at most."""

    def __init__(self, stack: ExitStack) -> None:
        self.asked, self.most = list[str](), 0
        self.both = [stack.enter_context(FakeOpenAI(self._answer, latency_s=LATENCY_S)) for _ in range(2)]
        self.urls = " ".join(s.url for s in self.both)

    def _answer(self, body: dict[str, Any]) -> str:
        self.asked.append(body["messages"][-1]["content"])
        self.most = max(self.most, sum(s.in_flight for s in self.both))
        return "yes"

    def count(self, word: str) -> int:
        return sum(text.startswith(word) for text in self.asked)


class Lanes:
    """The crew as a client sees it, its servers, and the broker it runs on."""

    def __init__(self, mesh: Mesh, servers: Servers, host: Host) -> None:
        self.mesh, self.servers, self.host = mesh, servers, host

    def start(self, agent: str, many: int) -> Any:
        return self.mesh.start(self.mesh.crew.agents[agent], many)


@pytest.fixture(params=["valkey", "rabbitmq"])
def lanes(request: pytest.FixtureRequest, valkey: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lanes]:
    broker = request.getfixturevalue(request.param).broker_url
    with ExitStack() as stack:
        servers = Servers(stack)
        monkeypatch.setenv("LANES_AT", servers.urls)
        config = Config(broker=broker, journal=valkey.url, lease_s=3.0, sweep_s=0.2)
        mesh = Mesh(load_crew(CREW), config=config)
        stack.callback(mesh.close)
        yield Lanes(mesh, servers, stack.enter_context(Host(CREW, config)))


def test_an_urgent_step_passes_a_full_low_lane(lanes: Lanes, eventually: Eventually) -> None:
    patient = lanes.start("Patient", MANY)
    eventually(lambda: lanes.servers.count("low") > 3 * PLACES)
    before = lanes.servers.count("low")
    assert lanes.start("Urgent", 1).result(timeout_s=30) == 1
    meanwhile = lanes.servers.count("low") - before
    assert patient.result(timeout_s=60) == MANY
    assert meanwhile < MANY / 2  # in one queue all of them would have come first
    assert lanes.servers.most == PLACES


def test_a_flood_of_urgent_steps_does_not_starve_the_low_lane(lanes: Lanes, eventually: Eventually) -> None:
    flood = lanes.start("Urgent", MANY)
    eventually(lambda: lanes.servers.count("now") > 2 * PLACES)
    assert lanes.start("Patient", 4).result(timeout_s=30) == 4
    assert lanes.servers.count("now") < MANY
    assert flood.result(timeout_s=60) == MANY
    assert lanes.servers.most == PLACES


@pytest.mark.parametrize("lanes", ["rabbitmq"], indirect=True)
def test_workers_killed_with_steps_in_hand_lose_none(lanes: Lanes, eventually: Eventually) -> None:
    """The second death makes suspects of them: their queues are another process's, with the same lanes."""
    for server in lanes.servers.both:
        server.faults.extend([Fault(hang=True)] * PLACES)
    many = PLACES - 1  # one is kept for the realtime lane
    run = lanes.start("Patient", many)
    for death in (1, 2):
        eventually(lambda so_far=death * many: sum(len(s.requests) for s in lanes.servers.both) == so_far)
        (pid,) = lanes.host.pids.values()
        os.kill(pid, signal.SIGKILL)
    for server in lanes.servers.both:
        server.faults.clear()
    assert run.result(timeout_s=30) == many
    assert any("standby" in name for name in lanes.host.pids)
    ends = [e.n for e in run.events() if isinstance(e, StepDone)]
    assert sorted(ends) == list(range(1, many + 1))


class Holding:
    """A model that answers when it is told to, and counts who waits."""

    def __init__(self) -> None:
        self.waiting, self.most, self.asked, self.go = 0, 0, 0, threading.Event()

    async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
        self.asked, self.waiting = self.asked + 1, self.waiting + 1
        self.most = max(self.most, self.waiting)
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        self.waiting -= 1
        return Answer(Message("assistant", "yes"))


def test_on_rabbitmq_what_there_is_no_room_for_waits_in_the_broker(
    rabbitmq: Any, valkey: Any, eventually: Eventually
) -> None:
    model, many, room = Holding(), 20, [3]
    crew = load_crew(CREW)
    config = Config(broker=rabbitmq.url, journal=valkey.url)
    mesh, other = (Mesh(crew, config=config, models=lambda wanted: (model, "m")) for _ in range(2))
    night = [crew.queues.broker_name("night")]
    admitted = mesh.worker(queues=["night"], concurrency=many, admits=lambda in_flight: room[0] - in_flight)
    with mesh.worker(queues=["main"]), admitted:
        run = mesh.start(crew.lead, many)
        eventually(lambda: model.waiting == 3 and inspect_broker(mesh.app, night).messages == {night[0]: many - 3 - 1})
        rabbitmq.sync_queues()
        rabbitmq.kill()
        rabbitmq.restart()
        room[0] = 5  # the three of the connection that is gone are counted
        eventually(lambda: model.waiting == 5 and inspect_broker(mesh.app, night).messages == {night[0]: many - 5 - 1})
        with other.worker(queues=["night"], admits=lambda in_flight: 4 - in_flight):  # another device has room
            eventually(lambda: model.waiting == 5 + 4)
            model.go.set()
            assert run.result(timeout_s=30) == many
    mesh.close()
    other.close()
    assert model.most == 9


def test_on_rabbitmq_what_a_full_worker_holds_back_goes_to_one_with_room(
    rabbitmq: Any, valkey: Any, eventually: Eventually
) -> None:
    crew, config = load_crew(CREW), Config(broker=rabbitmq.url, journal=valkey.url)
    models = Holding(), Holding()
    full, free = (Mesh(crew, config=config, models=lambda wanted, m=m: (m, "m")) for m in models)
    with full.worker(queues=["main"]), full.worker(queues=["night"], admits=lambda in_flight: 1 - in_flight):
        run = full.start(crew.lead, 2)
        eventually(lambda: models[0].waiting == 1)
        with free.worker(queues=["night"], admits=lambda in_flight: 1 - in_flight):
            eventually(lambda: models[1].waiting == 1)
            for model in models:
                model.go.set()
            assert run.result(timeout_s=30) == 2
    full.close()
    free.close()


def test_on_rabbitmq_what_waits_too_long_to_be_let_in_is_sent_again(
    rabbitmq: Any, valkey: Any, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rabbitmq_consumer, "MAX_UNACKED_S", 0.3)
    monkeypatch.setattr(rabbitmq_consumer, "TICK_S", 0.1)
    model, acked = Holding(), list[Any]()
    ack = BrokerMessage.ack
    monkeypatch.setattr(BrokerMessage, "ack", lambda *args, **more: acked.append(args) or ack(*args, **more))
    crew = load_crew(CREW)
    mesh = Mesh(crew, config=Config(broker=rabbitmq.url, journal=valkey.url), models=lambda wanted: (model, "m"))
    with mesh.worker(queues=["main"]), mesh.worker(queues=["night"], admits=lambda in_flight: 1 - in_flight):
        run = mesh.start(crew.lead, 3)
        eventually(lambda: len(acked) > 3)  # parked, acked, and sent again by the outbox
        model.go.set()
        assert run.result(timeout_s=30) == 3
    mesh.close()
    assert model.most == 1


def test_all_groups_go_on_when_the_broker_was_away(valkey: Any, eventually: Eventually) -> None:
    """They share an app, whose registry knows the queues of the last one alone; and what goes on is counted on."""
    crew, model = load_crew(CREW), Holding()
    config = Config(broker=valkey.broker_url, journal=valkey.url, sweep_s=0.2)
    mesh = Mesh(crew, config=config, models=lambda wanted: (model, "m"))
    with mesh.worker():
        runs = [mesh.start(crew.agents["Patient"], 2 * PLACES), mesh.start(crew.agents["Urgent"], 1)]
        eventually(lambda: model.waiting == PLACES)
        valkey.kill()
        valkey.restart()
        again = mesh.start(crew.agents["Urgent"], 2)
        model.go.set()
        assert [run.result(timeout_s=30) for run in (*runs, again)] == [2 * PLACES, 1, 2]
    mesh.close()
    assert model.most == PLACES


@pytest.mark.parametrize("admits", [None, lambda in_flight: 2 - in_flight])
def test_on_rabbitmq_a_worker_that_leaves_begins_nothing_more(
    rabbitmq: Any, valkey: Any, eventually: Eventually, admits: Any
) -> None:
    crew, model, many = load_crew(CREW), Holding(), 8
    mesh = Mesh(crew, config=Config(broker=rabbitmq.url, journal=valkey.url), models=lambda wanted: (model, "m"))
    night = crew.queues.broker_name("night")
    leaving = InProcessWorker(
        [runtime_of(mesh.app, mesh.crew.name)],
        [EmbeddedWorker(mesh.app, queues=[night], concurrency=2, admits=admits)],
    )
    with mesh.worker(queues=["main"]):
        leaving.start()
        run = mesh.start(crew.lead, many)
        eventually(lambda: model.waiting == 2)
        stopping = threading.Thread(target=leaving.stop)
        stopping.start()
        # what it had not begun is there for others while it drains
        eventually(lambda: inspect_broker(mesh.app, [night]).messages == {night: many - 2})
        model.go.set()
        stopping.join()
        assert model.asked == 2
        with mesh.worker(queues=["night"]):
            assert run.result(timeout_s=30) == many
    mesh.close()
    assert model.asked == many


class Anyone(Agent):
    """Somebody."""


A, B, C = "http://a:1/v1", "http://b:1/v1", "http://c:1/v1"


def test_queues_in_front_of_the_same_servers_share_their_places() -> None:
    queues = [
        Queue("main"), ServerQueue("a", model="m", urls=[A, B]), ServerQueue("b", model="m", urls=[B, A], lane="low"),
        ServerQueue("c", model="n", urls=[A, B]), Queue("d"),
    ]  # fmt: skip
    crew = Crew(Anyone(), queues=queues)
    assert crew.queues.worker_groups() == [["main", "d"], ["a", "b"], ["c"]]
    assert crew.queues.worker_groups(["b", "d"]) == [["b"], ["d"]]


def test_lanes_share_all_of_their_servers_or_none() -> None:
    talk = ServerQueue("talk", urls=[A, B], lane="realtime")
    with pytest.raises(DefinitionError, match=r"are lanes \(realtime, low\) that share http://b:1/v1, but not all"):
        Crew(Anyone(), queues=[talk, ServerQueue("night", urls=[B, C], lane="low")])
    assert Crew(Anyone(), queues=[talk, ServerQueue("night", urls=[C], lane="low")])
