"""Three classes of queue, each with only its own parameters; a parameter of another class names the line to write."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from agentmesh import Agent, Crew, DefinitionError, DeviceQueue, Queue, ServerQueue
from agentmesh.definitions.queue import BaseQueue
from agentmesh.definitions.step import Ask


class Plain(Agent):
    """Names no queue."""


A, B = "http://a:1/v1", "http://b:1/v1"


@pytest.mark.parametrize(
    ("cls", "options", "message", "hint"),
    [
        (Queue, {"model": "m"}, "'m' is a local model, which the workers of a Queue do not load",
         "write DeviceQueue('gpu', model='m')"),
        (Queue, {"model": "local:m"}, "which the workers of a Queue do not load", "write DeviceQueue('gpu', model='m')"),
        (DeviceQueue, {"lane": "low"}, "DeviceQueue needs `model`", "write DeviceQueue('gpu', model='NAME', lane='low')"),
        (ServerQueue, {}, "ServerQueue needs `urls`", "write ServerQueue('gpu', urls=['http://HOST:8000/v1'])"),
        (DeviceQueue, {"model": "openai:m"}, "which the workers of a DeviceQueue load", "write Queue('gpu', model='openai:m')"),
        (Queue, {"devices": [0]}, "has no parameter `devices`", "write DeviceQueue('gpu', model='NAME', devices=[0])"),
        (Queue, {"lane": "low"}, "has no parameter `lane`", "write DeviceQueue('gpu', model='NAME', lane='low')"),
        (Queue, {"url": A, "model": "m"}, "has no parameter `url`", f"write ServerQueue('gpu', urls='{A}', model='m')"),
        (Queue, {"key_env": "K"}, "has no parameter `key_env`",
         "write ServerQueue('gpu', urls=['http://HOST:8000/v1'], key_env='K')"),
        (DeviceQueue, {"model": "m", "urls": [A]}, "DeviceQueue has no parameter `urls`",
         f"write ServerQueue('gpu', model='m', urls=['{A}'])"),
        (DeviceQueue, {"model": "m", "gpu_memory": 0.5}, "has no parameter `gpu_memory`",
         "write DeviceQueue('gpu', model='m', gpu_memory_fraction=0.5)"),
        (DeviceQueue, {"model": "m", "pool": "prefork"}, "has no parameter `pool`",
         "leave out `pool`, which only Queue has: DeviceQueue('gpu', model='m')"),
        (ServerQueue, {"urls": A, "away_s": 0}, "has no parameter `away_s`",
         f"write ServerQueue('gpu', urls='{A}', unavailable_timeout_s=0)"),
    ],
)  # fmt: skip
def test_a_parameter_of_another_class(cls: Any, options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        cls("gpu", **options)
    assert caught.value.message.startswith("queue 'gpu': ")
    assert caught.value.message.endswith(message)
    assert caught.value.hint == hint
    line = hint.removeprefix("write ").removeprefix("leave out `pool`, which only Queue has: ")
    made = eval(line, {"Queue": Queue, "DeviceQueue": DeviceQueue, "ServerQueue": ServerQueue})
    assert isinstance(made, BaseQueue)  # the line that it says to write can be written


def test_a_parameter_that_no_class_has() -> None:
    with pytest.raises(DefinitionError) as caught:
        Queue("gpu", colour="red")  # type: ignore[call-arg]  # the mistake
    assert caught.value.message == "queue 'gpu': Queue has no parameter `colour`"
    assert caught.value.hint.startswith("use one of: Queue(name, concurrency, rate, model, pool) · DeviceQueue(name, ")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Queue("a b"), "queue 'a b' must be letters, digits"),
        (lambda: Queue("a", concurrency=-1), "concurrency=-1 is negative; write 0"),
        (lambda: Queue("a", pool="threads"), "unknown pool 'threads'; use one of: asyncio, prefork"),
        (lambda: DeviceQueue("a", model=""), "model is empty; name one"),
        (lambda: DeviceQueue("a", model="local:"), "model is empty; name one"),
        (lambda: DeviceQueue("a", model="m", devices=0), "devices=0 is not a list of different GPU numbers"),  # type: ignore[arg-type]
        (lambda: DeviceQueue("a", model="m", devices=[True]), "devices=.True,. is not a list of different GPU numbers"),
        (lambda: DeviceQueue("a", model="m", gpu_memory_fraction="1"), "gpu_memory_fraction='1' is not a number"),  # type: ignore[arg-type]
        (lambda: DeviceQueue("a", model=None), "queue 'a': model=None is not text; write text"),  # type: ignore[arg-type]
        (lambda: Queue(5), "queue 5: name=5 is not text; write text"),  # type: ignore[arg-type]
        (lambda: Queue("a", concurrency=1.5), "concurrency=1.5 is not a whole number"),  # type: ignore[arg-type]
        (lambda: Queue("a", rate=5), "rate=5 is not text"),  # type: ignore[arg-type]
        (lambda: Queue("a", rate="²/s"), "rate='²/s' is not a number per"),
        (lambda: Queue("a", rate="9" * 5000 + "/s"), "is not a number per"),
        (lambda: ServerQueue("a", urls="http://h:x"), "'http://h:x' in urls is not the URL of a server"),
        (lambda: ServerQueue("a", urls="http://[::1"), "is not the URL of a server"),
        (lambda: ServerQueue("a", urls="http://h?x=1"), "is not the URL of a server"),
        (lambda: ServerQueue("a", urls=None), "None in urls is not the URL of a server"),  # type: ignore[arg-type]
        (
            lambda: ServerQueue("a", urls=A, unavailable_timeout_s=float("nan")),
            "unavailable_timeout_s=nan is not a time",
        ),
        (lambda: Crew(Plain(), queues=Queue("a")), "crew '.*': queues is Queue.*, not a list; write queues="),  # type: ignore[arg-type]
        (lambda: Crew(Plain(), queues=["a"]), "crew '.*': queues has 'a', which is not a queue; write Queue.'a'."),  # type: ignore[list-item]
        (lambda: ServerQueue("a", urls=A, lane="fast"), "unknown lane 'fast'; use one of: realtime, high, low"),
    ],
)
def test_a_value_that_cannot_be(make: Any, sentence: str) -> None:
    with pytest.raises(DefinitionError, match=sentence):
        make()


def test_what_a_queue_says_of_itself() -> None:
    plain, cpu = Queue("main"), Queue("cpu", pool="prefork")
    device, server = DeviceQueue("gpu", model="m", devices=[0]), ServerQueue("far", urls=[A, B], model="m")
    kinds = [queue.worker_kind for queue in (plain, cpu, device, server)]
    assert kinds == ["asyncio", "prefork", "device", "asyncio"]
    assert [q.isolates_suspects for q in (plain, cpu, device, server)] == [True, True, False, True]
    assert [q.serves_model("local:m") for q in (plain, cpu, device, server)] == [False, False, True, True]
    assert [q.serves_model("openai:m") for q in (plain, cpu, device, server)] == [False] * 4
    assert Queue("paid", model="openai:m", rate="5/s").serves_model("openai:m")
    assert [q.concurrency for q in (plain, device, server)] == [100, 256, 100]
    assert not ServerQueue("far", urls=A).serves_model("local:")
    assert server.shared_places == ServerQueue("night", urls=[B, A], model="m", lane="low").shared_places


@pytest.mark.parametrize(
    "queue", [Queue("main", rate="5/s"), DeviceQueue("gpu", model="m", devices=[0, 1]), ServerQueue("far", urls=A)]
)
def test_a_queue_is_a_value(queue: Any) -> None:
    assert pickle.loads(pickle.dumps(queue)) == queue
    assert copy.copy(queue) == queue
    assert dataclasses.replace(queue, name="other").name == "other"
    assert len({queue, copy.copy(queue)}) == 1


def test_steps_on_a_model_go_to_its_queue() -> None:
    class Paid(Agent):
        model = "openai:big"

    class Cheap(Agent):
        model = "openai:small"

    paid, crew_queues = Queue("paid", model="openai:big", rate="5/s"), [Queue("main")]
    crew = Crew(Paid(), Cheap(), queues=[*crew_queues, paid, DeviceQueue("gpu", model="local:m")])
    asks = {name: Ask(name, agent.model) for name, agent in crew.agents.items()}
    assert {name: crew.queues.of(ask) for name, ask in asks.items()} == {"Paid": "paid", "Cheap": "main"}
    assert crew.queues.of(Ask("Any", "local:m")) == "gpu"
