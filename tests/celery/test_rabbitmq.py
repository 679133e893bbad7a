"""RabbitMQ as the broker, the journal in Valkey: what differs from Valkey for both, against a real server."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from agentmesh import Agent, Approve, Context, Crew, ServiceDown, Sleep, tool
from agentmesh.celery import rabbitmq as rabbit
from agentmesh.celery import rabbitmq_consumer
from agentmesh.celery.broker import QueueLengths
from agentmesh.celery.publisher import MAX_WAITING, Publisher
from agentmesh.journal.types import OutboxMessage
from agentmesh.mesh import Mesh
from agentmesh.testing import FakeOpenAI, ScriptedModel, says
from agentmesh.testing.servers import RabbitServer, ValkeyServer

Eventually = Callable[..., None]


class Echo(Agent):
    """Says what it is told."""


@tool
def wait(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return f"waited {seconds}"


class Slow(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(wait.on(float(task)))


class Everything(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        said = ctx.gather([Echo().on(f"{task}{i}") for i in range(40)])
        ctx.do(Sleep(0.2))
        ctx.do(Approve("go on?"))
        return f"{len(said)} {said[-1]}"


def mesh_on(
    rabbitmq: RabbitServer,
    valkey: ValkeyServer,
    lead: Agent[Any, Any],
    *,
    app: Celery | None = None,
    name: str = "rabbit",
) -> Mesh:
    model = ScriptedModel(lambda request: says(request.messages[-1].text))
    crew = Crew(lead, Echo(), name=name, model=model)
    return Mesh(crew, app=app, broker="" if app else rabbitmq.url, journal=valkey.url)


def test_a_run_with_everything_in_it(rabbitmq: RabbitServer, valkey: ValkeyServer, eventually: Eventually) -> None:
    mesh = mesh_on(rabbitmq, valkey, Everything())
    with mesh.worker():
        run = mesh.start(Everything(), "tea")
        eventually(lambda: run.waiting_for())
        run.approve(run.waiting_for()[0], by="ana")
        assert run.result(timeout_s=20) == "40 tea39"
        facts = rabbit.inspect_broker(mesh.app, mesh.crew.queues.broker_names())
        assert facts.version.startswith(("3.", "4."))
        assert facts.other == {}  # quorum, with our delivery limit
        eventually(
            lambda: set(rabbit.inspect_broker(mesh.app, mesh.crew.queues.broker_names()).messages.values()) == {0}
        )
        began = time.monotonic()
    assert time.monotonic() - began < 2.0
    mesh.close()


def test_an_app_of_ones_own_keeps_its_settings(rabbitmq: RabbitServer, valkey: ValkeyServer) -> None:
    app = Celery("shop", broker=rabbitmq.url, set_as_current=False)
    app.conf.update(broker_heartbeat=0, task_default_queue="shop", broker_transport_options={"max_retries": 7})
    before = dict(app.conf)
    mesh = mesh_on(rabbitmq, valkey, Everything(), app=app, name="shop")
    with mesh.worker():
        assert mesh.run(Echo(), "tea", timeout_s=20) == "tea"
    assert dict(app.conf) == before
    assert [q for q in rabbitmq.queues() if q.startswith(("agentmesh", "shop"))] == mesh.crew.queues.broker_names()
    mesh.close()


def test_a_message_dropped_at_its_delivery_limit_is_sent_again(
    rabbitmq: RabbitServer, valkey: ValkeyServer, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rabbit.ARGUMENTS, "x-delivery-limit", 2)
    mesh = mesh_on(rabbitmq, valkey, Everything())
    queue = mesh.crew.queues.broker_name("main")
    run = mesh.start(Echo(), "tea")
    eventually(lambda: rabbit.inspect_broker(mesh.app, [queue]).messages == {queue: 1})
    deliveries = 0
    with mesh.app.connection_for_read() as connection:
        channel = connection.channel()
        while (message := channel.basic_get(queue)) is not None:
            deliveries += 1
            channel.basic_reject(message.delivery_tag, requeue=True)
            time.sleep(0.02)  # a requeued message is there again a moment later
    assert deliveries == 3
    with mesh.worker():
        assert run.result(timeout_s=20) == "tea"
    mesh.close()


def test_a_step_may_last_longer_than_the_brokers_patience(
    rabbitmq: RabbitServer, valkey: ValkeyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ closes the channel of who keeps a message for consumer_timeout: half an hour, and here a second."""
    monkeypatch.setattr(rabbitmq_consumer, "MAX_UNACKED_S", 0.3)
    monkeypatch.setattr(rabbitmq_consumer, "TICK_S", 0.1)
    rabbitmq.set_env(consumer_timeout=1_000, channel_tick_interval=200)
    mesh = mesh_on(rabbitmq, valkey, Slow())
    try:
        with mesh.worker(concurrency=1):
            runs = [mesh.start(Slow(), seconds) for seconds in ("3", "0.1")]
            assert [r.result(timeout_s=20) for r in runs] == ["waited 3.0", "waited 0.1"]
    finally:
        rabbitmq.set_env(consumer_timeout=1_800_000, channel_tick_interval=60_000)
    assert [r.getMessage() for r in caplog.records] == []  # no worker was made again
    mesh.close()


def message_to(queue: str) -> OutboxMessage:
    body = {"body": "[]", "content-type": "application/json", "content-encoding": "utf-8", "headers": {}}
    return OutboxMessage(queue, json.dumps({**body, "properties": {"correlation_id": "c"}}))


def test_what_waits_for_the_broker_is_bounded(
    rabbitmq: RabbitServer, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    app = Celery("sender", broker=rabbitmq.url, set_as_current=False)
    sent = message_to("agentmesh.away.main")
    lengths, publisher = QueueLengths(app), Publisher(app)
    assert lengths([sent.queue]) == {sent.queue: 0}
    publisher(sent)
    eventually(lambda: lengths([sent.queue]) == {sent.queue: 1})
    rabbitmq.sync_queues()
    rabbitmq.kill()
    for _ in range(MAX_WAITING + 50):
        publisher(sent)
    rabbitmq.restart()
    eventually(lambda: lengths([sent.queue]) == {sent.queue: 1 + MAX_WAITING})
    assert "50 that did not fit" in caplog.text
    publisher.close()
    lengths.close()


def test_a_queue_deleted_under_a_publisher(rabbitmq: RabbitServer, eventually: Eventually) -> None:
    """RabbitMQ returns the message; the queue is made again, and the message goes out again."""
    app = Celery("sender", broker=rabbitmq.url, set_as_current=False)
    sent = message_to("agentmesh.gone.main")
    lengths, publisher = QueueLengths(app), Publisher(app)
    assert lengths([sent.queue]) == {sent.queue: 0}
    publisher(sent)
    eventually(lambda: lengths([sent.queue]) == {sent.queue: 1})
    rabbitmq.flush()
    publisher(sent)
    publisher(sent)
    publisher.close()
    assert lengths([sent.queue]) == {sent.queue: 2}
    lengths.close()


def test_no_broker_at_the_start(valkey: ValkeyServer) -> None:
    app = Celery("nowhere", broker="amqp://ana:secret@127.0.0.1:1//", set_as_current=False)
    mesh = Mesh(Crew(Echo(), name="nowhere"), app=app, journal=valkey.url)
    with pytest.raises(ServiceDown, match=r"no broker responds at amqp://ana:\*\*\*@127.0.0.1:1//") as caught:
        mesh.worker().start()
    assert "secret" not in str(caught.value)
    mesh.close()


def test_from_the_command_line(rabbitmq: RabbitServer, tmp_path: Path) -> None:
    """A journal that is not named is the embedded Valkey's."""
    (tmp_path / "crew.py").write_text(
        "from agentmesh import *\nclass Helper(Agent):\n    'Helps.'\ncrew = Crew(Helper(), model='openai:fake')\n"
    )

    def shell(*args: str) -> "subprocess.CompletedProcess[str]":
        argv = [sys.executable, "-m", "agentmesh.cli.main", *args, "--broker", rabbitmq.url]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)

    with FakeOpenAI(lambda body: says(body["messages"][-1]["content"].upper())) as server:
        env = {**os.environ, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k", "AGENTMESH_MODEL": "openai:fake"}
        done = shell("run", "crew.py", "tea", "--id", "r1")
        assert (done.returncode, done.stdout) == (0, "TEA\n"), done.stderr
        assert "r1" in shell("runs", "ls").stdout
        assert shell("run", "crew.py", "cake", "--id", "r2", "--detach").stdout == "r2\n"
        shell("runs", "tail", "r2")
        assert "RunDone" in shell("runs", "show", "r2").stdout
        assert {"agentmesh.crew.main"} <= set(rabbitmq.queues())
        told = shell("doctor", "crew.py")
        assert told.returncode == 0, told.stdout
        assert "broker: RabbitMQ " in told.stdout
        assert "queue agentmesh.crew.main: 0 messages wait, a quorum queue" in told.stdout
        argv = [sys.executable, "-m", "agentmesh.cli.main", "worker", "crew.py", "--broker", rabbitmq.url]
        with subprocess.Popen(argv, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            line = worker.stdout.readline()
            worker.terminate()
        assert f"broker amqp://guest:**@127.0.0.1:{rabbitmq.port}" in line
        assert "journal the embedded Valkey in .agentmesh" in line
