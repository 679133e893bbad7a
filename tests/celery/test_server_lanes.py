"""Lanes in front of model servers: real worker processes, a real broker, servers that count who asks them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Agent, Crew, DefinitionError, Queue
from agentmesh.boot import load_crew
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.testing import FakeOpenAI, Host

CREW = str(Path(__file__).parent / "lanes_crew.py")
PLACES, LATENCY_S, MANY = 4, 0.05, 120
Eventually = Callable[..., None]


class Servers:
    """Two servers, who asked them in what order, and how many at once at most."""

    def __init__(self, stack: ExitStack) -> None:
        self.asked, self.most = list[str](), 0
        self._both = [stack.enter_context(FakeOpenAI(self._answer, latency_s=LATENCY_S)) for _ in range(2)]
        self.urls = " ".join(s.url for s in self._both)

    def _answer(self, body: dict[str, Any]) -> str:
        self.asked.append(body["messages"][-1]["content"])
        self.most = max(self.most, sum(s.in_flight for s in self._both))
        return "yes"

    def count(self, word: str) -> int:
        return sum(text.startswith(word) for text in self.asked)


class Lanes:
    """The crew as a client sees it, its servers, and the broker it runs on."""

    def __init__(self, mesh: Mesh, servers: Servers, host: Host) -> None:
        self.mesh, self.servers, self.host = mesh, servers, host

    def start(self, agent: str, many: int) -> Any:
        return self.mesh.start(self.mesh.crew.agents[agent], many)


@pytest.fixture(params=["valkey"])
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


class Anyone(Agent):
    """Somebody."""


A, B, C = "http://a:1/v1", "http://b:1/v1", "http://c:1/v1"


def test_queues_in_front_of_the_same_servers_share_their_places() -> None:
    queues = [
        Queue("main"), Queue("a", model="m", url=[A, B]), Queue("b", model="m", url=[B, A], lane="low"),
        Queue("c", model="n", url=[A, B]), Queue("d"),
    ]  # fmt: skip
    crew = Crew(Anyone(), queues=queues)
    assert crew.groups() == [["main", "d"], ["a", "b"], ["c"]]
    assert crew.groups(["b", "d"]) == [["b"], ["d"]]


def test_lanes_share_all_of_their_servers_or_none() -> None:
    talk = Queue("talk", url=[A, B], lane="realtime")
    with pytest.raises(DefinitionError, match=r"are lanes \(realtime, low\) that share http://b:1/v1, but not all"):
        Crew(Anyone(), queues=[talk, Queue("night", url=[B, C], lane="low")])
    assert Crew(Anyone(), queues=[talk, Queue("night", url=[C], lane="low")])
