"""What must survive, on either broker: real worker processes, real servers, real kills.

The fake model server and a tool's file are the oracle.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

from agentmesh.celery.publisher import publisher_for
from agentmesh.celery.registry import runtime_of
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.engine.run import Run
from agentmesh.journal.events import GatherClosed
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeOpenAI
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.supervisor import Supervisor

LATENCY_S = 0.3


class Scene:
    """A mesh, supervised workers, the oracle."""

    def __init__(
        self, store: Any, broker: Any, server: FakeOpenAI, oracle: Any, *, processes: int = 1, supervised: bool = True
    ) -> None:
        self.server, self.oracle, self.log = server, oracle, oracle.log
        self.config = Config(broker=broker.broker_url, journal=store.url, lease_s=2.0, sweep_s=0.2, drain_s=3.0)
        self.crew = load_crew(oracle.crew)
        self.mesh = Mesh(self.crew, config=self.config)
        argv = worker_command(self.config, crews=[oracle.crew], queues=[], concurrency=0)
        death = release_on_death(self.config, self.crew.queues.broker_names()) if supervised else None
        self.supervisor = Supervisor(
            [argv] * processes, on_death=death, drain_s=5, output=subprocess.DEVNULL,
            env=oracle.env(server),
        )  # fmt: skip
        self.excused = 0

    def start(self, task: str) -> Run[str]:
        return self.mesh.start(self.crew.lead, task, run_id=task)

    def kill(self, number: int = signal.SIGKILL, which: int = 0) -> int:
        """A worker process gets a signal; what it asked and had not yet written may be asked again."""
        pid = list(self.supervisor.pids.values())[which]
        os.kill(pid, number)
        time.sleep(0.1)  # what it had sent is read by the server a moment after it is dead
        self.excused += len(self.server.requests) - self.written()
        return pid

    def written(self) -> int:
        """The LLM calls whose answers are in a journal."""
        return sum(bool(e.usage) for _, e in self.oracle.ends(self.mesh, *(head.id for head in self.mesh.runs())))

    def check(self, *tasks: str) -> None:
        """Right answers, each step ended once, finished calls not paid again."""
        for task in tasks:
            run: Run[str] = self.mesh.get(task)
            assert run.result(timeout_s=30) == self.oracle.expected(task)
        assert self.oracle.ended_twice(self.mesh, *tasks) == []
        assert self.oracle.asked_again(self.server) <= self.excused
        assert len(self.oracle.asked(self.server)) == 9 * len(tasks)


@pytest.fixture(params=["valkey", "rabbitmq"])
def broker(request: pytest.FixtureRequest, valkey: Any) -> Any:
    """The server that carries the messages; the journal is Valkey's in both."""
    return request.getfixturevalue(request.param)


@contextmanager
def scene(store: Any, broker: Any, oracle: Any, **how: Any) -> Iterator[Scene]:
    with FakeOpenAI(oracle.answer, latency_s=LATENCY_S) as server:
        it = Scene(store, broker, server, oracle, **how)
        it.supervisor.start()
        try:
            assert it.supervisor.wait_ready(20)
            yield it
        finally:
            it.supervisor.stop(now=True)
            it.supervisor.join(10)
            it.mesh.close()


def closed(it: Scene, task: str) -> bool:
    return any(isinstance(e, GatherClosed) for e in it.mesh.get(task).events())


MOMENTS: dict[str, Callable[[Scene], Any]] = {
    "before it claims": lambda it: True,
    "in an LLM call": lambda it: it.server.in_flight >= 2,
    "in a tool": lambda it: it.log.read_text(),
    "between commit and plan": lambda it: it.server.answered >= 5,
    "while joining": lambda it: closed(it, "tea"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_killed(valkey: Any, broker: Any, oracle: Any, moment: str, eventually: Any) -> None:
    with scene(valkey, broker, oracle) as it:
        it.start("tea")
        eventually(lambda: MOMENTS[moment](it))
        it.kill()
        killed = time.monotonic()
        it.check("tea")
        assert time.monotonic() - killed < 15


def test_workers_killed_again_and_again_without_anybody_giving_back(
    valkey: Any, broker: Any, oracle: Any, eventually: Any
) -> None:
    """Only leases and the sweeper bring it back, as when a whole host dies."""
    with scene(valkey, broker, oracle, processes=2, supervised=False) as it:
        for task in ("a", "b", "c"):
            it.start(task)
        for i in range(4):
            eventually(lambda: it.server.in_flight >= 1)
            it.kill(which=i % 2)
            eventually(lambda: len(it.supervisor.pids) == 2)
            time.sleep(0.4)
        it.check("a", "b", "c")


def test_the_broker_killed_under_load(valkey: Any, rabbitmq: Any, oracle: Any, eventually: Any) -> None:
    """What was queued is on its disk, what was in flight it delivers again, what it did not confirm is sent again."""
    with scene(valkey, rabbitmq, oracle) as it:
        it.start("a")
        eventually(lambda: it.server.in_flight >= 2)
        rabbitmq.sync_queues()
        rabbitmq.kill()
        it.start("b")  # the journal has it; it goes out when the broker is back
        it.start("c")
        time.sleep(0.3)
        rabbitmq.restart()
        it.check("a", "b", "c")
        assert it.excused == 0  # a step that runs does not need the broker


def test_the_store_killed_under_load(valkey: Any, broker: Any, oracle: Any, eventually: Any) -> None:
    with scene(valkey, broker, oracle) as it:
        for task in ("a", "b", "c"):
            it.start(task)
        for _ in range(2):
            eventually(lambda: it.server.in_flight >= 2)
            valkey.kill()
            time.sleep(0.5)
            valkey.restart()
        it.check("a", "b", "c")
        assert it.excused == 0  # a call that was answered while the store was down is still written


def test_a_worker_that_slept_through_its_lease_is_refused(
    valkey: Any, broker: Any, oracle: Any, eventually: Any
) -> None:
    with scene(valkey, broker, oracle, processes=2) as it:
        it.start("tea")
        eventually(lambda: it.server.in_flight >= 4)
        pid = it.kill(signal.SIGSTOP)
        it.check("tea")
        os.kill(pid, signal.SIGCONT)
        time.sleep(1.0)  # the zombie commits its steps in flight, and is refused
        it.check("tea")


def test_every_message_delivered_twice(valkey: Any, broker: Any, oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI(oracle.answer) as server:
        for name, value in oracle.env(server).items():
            monkeypatch.setenv(name, value)
        from agentmesh.models.registry import ModelRegistry

        crew = load_crew(oracle.crew)
        mesh = Mesh(crew, broker=broker.broker_url, journal=valkey.url, models=ModelRegistry())
        client = redis.Redis.from_url(valkey.url)
        send = publisher_for(mesh.app) if broker is not valkey else lambda sent: client.lpush(sent.queue, sent.body)

        def twice(sent: Any) -> None:
            send(sent)
            send(sent)

        monkeypatch.setattr(runtime_of(mesh.app, mesh.crew.name).journal, "_push", False)
        monkeypatch.setattr(runtime_of(mesh.app, mesh.crew.name).journal, "_send", twice)
        with mesh.worker():
            runs = [mesh.start(crew.lead, f"t{i}") for i in range(3)]
            assert [r.result(timeout_s=20) for r in runs] == [oracle.expected(f"t{i}") for i in range(3)]
        assert len(server.requests) == 27
        assert oracle.looked_up() == oracle.words("t0", "t1", "t2")
        mesh.close()
        client.close()
