"""Lanes: the order of steps, the reserved places, and that an urgent step does not wait for a full low lane."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agentmesh import Agent, Context, Crew, DeviceQueue, Queue
from agentmesh.celery.lanes import REALTIME_POLL_S, TURNS, Lanes
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.message import Message, user
from agentmesh.model import Answer, Prompt

THREE = {"a": "low", "b": "realtime", "c": "high"}
PLACES, STEP_S = 4, 0.05


def with_places(named: dict[str, str], places: int, in_flight: int = 0) -> Lanes:
    lanes = Lanes(named, lambda in_flight: places - in_flight)
    assert lanes(in_flight) == places - in_flight
    return lanes


def test_realtime_comes_first_and_nobody_is_starved() -> None:
    lanes = with_places(THREE, 40, in_flight=10)
    orders = [lanes.order(["a", "b", "c"], 30, 1.0, 0) for _ in range(TURNS)]
    assert {(most, wait_s) for _, most, wait_s in orders} == {(28, 1.0)}
    first = ["".join(queues) for queues, _, _ in orders]
    assert first == ["bca", "bca", "bca", "cba", "bca", "bca", "bca", "abc"]


def test_the_last_places_are_for_the_realtime_lane_alone() -> None:
    lanes = with_places(THREE, 40)
    assert lanes.order(["a", "b", "b.suspects", "c"], 2, 1.0, 0) == (["b", "b.suspects"], 2, REALTIME_POLL_S)


def test_a_realtime_lane_that_has_what_is_kept_for_it_waits_for_its_turn() -> None:
    """Or a flood of urgent steps would take every place that becomes free, one by one."""
    lanes = with_places(THREE, 40)
    assert lanes.order(["a", "b", "c"], 1, 1.0, 1) == (["b"], 1, REALTIME_POLL_S)
    assert [lanes.order(["a", "b", "c"], 1, 1.0, 39)[0][0] for _ in range(TURNS)].count("b") == TURNS - 2


def test_what_is_kept_is_a_part_of_the_places_there_are_now() -> None:
    room = [64]
    lanes = Lanes(THREE, lambda in_flight: room[0] - in_flight)
    seen = []
    for room[0], in_flight in ((64, 0), (64, 60), (20, 18), (8, 7), (2, 1), (1, 0)):
        lanes(in_flight)
        seen.append(lanes.reserved)
    assert seen == [4, 4, 1, 1, 1, 0]


def test_without_a_realtime_lane_nothing_is_kept() -> None:
    for named in ({"a": "low", "c": "high"}, {"b": "realtime"}):
        lanes = with_places(named, 40, in_flight=39)
        assert lanes.reserved == 0
        assert set(lanes.order(list(named), 1, 1.0, 0)[0]) == set(named)


def test_a_lane_whose_message_had_nothing_to_do_has_its_turn_again_but_not_for_ever() -> None:
    lanes = with_places(THREE, 40)

    def first() -> str:
        return lanes.order(["a", "b", "c"], 30, 1.0, 0)[0][0]

    lanes.give_turn_back("a")
    assert [first(), first()] == ["a", "b"]
    lanes.give_turn_back("a.suspects")
    lanes.order(["b", "c"], 30, 1.0, 0)  # nothing of it is there to be asked: it keeps its turn
    assert first() == "a"
    seen = []
    for _ in range(3 * (TURNS + 1)):
        lanes.give_turn_back("a")
        seen.append(first())
    assert seen.count("b") + seen.count("c") == 3


class Slow:
    """A model that takes its time, and notes who asked when."""

    def __init__(self) -> None:
        self.now, self.most, self.begun = 0, 0, list[tuple[str, float]]()
        self.busy = threading.Event()

    async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.append((prompt.messages[-1].text, time.monotonic()))
        if len(self.begun) > 3 * PLACES:
            self.busy.set()
        await asyncio.sleep(STEP_S)
        self.now -= 1
        return Answer(Message("assistant", "yes"))


class Patient(Agent):
    """Asks for much, without haste."""

    queue = "night"

    def flow(self, task: str, ctx: Context) -> str:
        """All at once."""
        ctx.gather(self.ask([user(f"low {i}")]) for i in range(int(task)))
        return "done"


class Urgent(Agent):
    """Asks once, and somebody waits."""

    queue = "talk"

    def flow(self, task: str, ctx: Context) -> str:
        """Once."""
        return ctx.do(self.ask([user("now")])).text


class Flood(Urgent):
    """Asks for much at once, and somebody waits."""

    def flow(self, task: str, ctx: Context) -> str:
        """All at once."""
        ctx.gather(self.ask([user(f"now {i}")]) for i in range(int(task)))
        return "done"


@contextmanager
def two_lanes(valkey: Any, *agents: Agent[Any, Any]) -> Iterator[tuple[Mesh, Slow, Lanes]]:
    """A mesh with a worker of two lanes before a slow model, and one for the rest."""
    queues = [
        Queue("main"),
        DeviceQueue("night", model="m", lane="low"),
        DeviceQueue("talk", model="m", lane="realtime"),
    ]
    crew = Crew(*agents, name="lanes", model="local:m", queues=queues)
    model = Slow()
    mesh = Mesh(crew, config=Config(broker=valkey.broker_url, journal=valkey.url), models=lambda wanted: (model, "m"))
    lanes = Lanes({crew.queues.broker_name(q.name): q.lane for q in queues[1:]}, lambda in_flight: PLACES - in_flight)
    with mesh.worker(queues=["main"]), mesh.worker(queues=["night", "talk"], admits=lanes):
        yield mesh, model, lanes
    mesh.close()


def test_an_urgent_step_does_not_wait_for_a_full_low_lane(valkey: Any) -> None:
    with two_lanes(valkey, Patient(), Urgent()) as (mesh, model, lanes):
        patient = mesh.start(mesh.crew.agents["Patient"], "160")
        assert model.busy.wait(30)
        published = time.monotonic()
        assert mesh.run(mesh.crew.agents["Urgent"], "", timeout_s=30) == "yes"
        (began,) = [at for text, at in model.begun if text == "now"]
        waited_s = began - published
        patient.cancel()
    assert waited_s < 160 / PLACES * STEP_S / 2  # a plain queue would have had it wait for all of them
    assert len(model.begun) < 160
    assert model.most <= PLACES
    assert lanes.reserved == 1


def test_a_flood_of_urgent_steps_leaves_turns_to_the_others(valkey: Any) -> None:
    with two_lanes(valkey, Patient(), Flood()) as (mesh, model, _):
        flood = mesh.start(mesh.crew.agents["Flood"], "160")
        assert model.busy.wait(30)
        mesh.run(mesh.crew.agents["Patient"], "4", timeout_s=30)
        asked = [text for text, _ in model.begun]
        assert len(asked) < 160
        flood.cancel()


def test_what_a_cancelled_run_left_in_a_lane_does_not_use_up_its_turns(valkey: Any) -> None:
    with two_lanes(valkey, Patient(), Flood()) as (mesh, model, _):
        given_up = mesh.start(mesh.crew.agents["Patient"], "160")
        assert model.busy.wait(30)
        flood = mesh.start(mesh.crew.agents["Flood"], "160")
        given_up.cancel()
        mesh.run(mesh.crew.agents["Patient"], "4", timeout_s=30)
        assert len([text for text, _ in model.begun if text.startswith("now")]) < 160
        flood.cancel()
