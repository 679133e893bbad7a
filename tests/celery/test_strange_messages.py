"""Foreign messages in our queues stop no worker, and delay or lose no other message."""

import json
from typing import Any

import pytest
import redis

from agentmesh import Agent, Crew
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.testing import ScriptedModel, says


class Echo(Agent):
    """Says what it is told."""


HEADERS = {"task": "agentmesh.step", "id": "strange", "lang": "py"}
BODIES = ["[]", "{}", "7", '"text"', "[[], {}]", '[["no-run", "seven"], {}, {}]', "not JSON", ""]


@pytest.fixture(params=["valkey", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param).broker_url
    return url


def test_strange_messages_end_no_worker(broker: str, valkey: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = ScriptedModel(lambda prompt: says(prompt.messages[-1].text))
    crew = Crew(Echo(), name="strange", model=model)
    mesh = Mesh(crew, config=Config(broker=broker, journal=valkey.url))
    (queue,) = [q for q in crew.queues.broker_names() if not q.endswith(".suspects")]
    worker = mesh.worker()
    with worker:
        consumer = worker._workers[0]._worker
        for body in BODIES:
            with mesh.app.connection_for_write() as connection:
                producer = connection.Producer(auto_declare=False)
                how: dict[str, Any] = {"content_type": "application/json", "content_encoding": "utf-8"}
                producer.publish(body, routing_key=queue, headers=HEADERS, **how)
                producer.publish(body, routing_key=queue, **how)
        if broker == valkey.broker_url:
            with redis.Redis.from_url(valkey.url) as client:
                client.lpush(queue, "garbage", "[]", json.dumps({"body": "e30="}))
        runs = [mesh.start(Echo(), f"hello {i}") for i in range(5)]
        assert [run.result(timeout_s=20) for run in runs] == [f"hello {i}" for i in range(5)]
        assert worker._workers[0]._worker is consumer
    mesh.close()
    assert "starting a new one" not in caplog.text
