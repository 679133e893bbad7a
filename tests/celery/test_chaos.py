"""Chaos on real processes with the public kit: seeded kills, links cut at every command, silence, disturbed messages."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from agentmesh.boot import load_crew
from agentmesh.celery.loop import drive
from agentmesh.config import Config
from agentmesh.event import ENDS, GatherClosed, StepDone, StepFailed
from agentmesh.mesh import Mesh
from agentmesh.testing import (
    Chaos,
    DisturbMessages,
    FakeOpenAI,
    Host,
    KillHost,
    KillServer,
    KillWorker,
    Proxy,
    StopWorker,
    WorkerProcess,
    says,
    uses,
)

CREW = str(Path(__file__).parent / "survivors.py")
LEASE_S = 2.0


def answer(body: dict[str, Any]) -> Any:
    last = body["messages"][-1]
    if last["role"] == "tool":
        return says(f"<{last['content']}>")
    return uses("look_up", word=last["content"]) if body.get("tools") else says(f"page: {last['content']}")


def expected(task: str) -> str:
    return "page: " + " | ".join(f"<meaning of {task}-{i}>" for i in range(4))


class Scene:
    """A mesh and the oracle; workers are each test's own. What a struck worker held is noted as an excuse."""

    def __init__(self, valkey: Any, server: FakeOpenAI, log: Path) -> None:
        self.valkey, self.server = valkey, server
        self.config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=LEASE_S, sweep_s=0.1, drain_s=2.0)
        self.env = {"OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": "k", "SURVIVORS_LOG": str(log)}
        self.crew = load_crew(CREW)
        self.mesh = Mesh(self.crew, config=self.config)
        self.excused = 0

    def through(self, proxy: Proxy) -> Config:
        return self.config.model_copy(update={"broker": proxy.url, "journal": proxy.url})

    def victim(self, name: str, pid: int) -> None:
        with redis.Redis.from_url(self.valkey.url) as client:
            self.excused += client.scard(f"agentmesh:wl:{name}")

    def check(self, tasks: list[str]) -> None:
        """Right answers, every fact once, no call repeated that nobody had in flight when it was struck."""
        for task in tasks:
            assert self.mesh.get(task).result(timeout_s=45) == expected(task)
            for member in drive(self.mesh.journal.tree(task)):
                events = drive(self.mesh.journal.events(member))
                ends = Counter(e.n for e in events if isinstance(e, StepDone | StepFailed))
                closed = Counter(e.first for e in events if isinstance(e, GatherClosed))
                assert set(ends.values()) | set(closed.values()) <= {1}, (member, ends, closed)
                assert sum(isinstance(e, ENDS) for e in events) == 1
        asked = [json.dumps(r.body["messages"]) for r in self.server.requests]
        assert len(set(asked)) == 9 * len(tasks)
        assert len(asked) - len(set(asked)) <= self.excused


@contextmanager
def scene(valkey: Any, tmp_path: Path, *, latency_s: float = 0.1) -> Iterator[Scene]:
    log = tmp_path / "log"
    log.touch()
    with FakeOpenAI(answer, latency_s=latency_s) as server:
        it = Scene(valkey, server, log)
        try:
            yield it
        finally:
            it.mesh.close()


def begin(it: Scene, tasks: list[str], every_s: float = 0.0) -> None:
    for task in tasks:
        it.mesh.start(it.crew.lead, task, id=task)
        time.sleep(every_s)


def test_workers_and_the_store_killed_on_a_seeded_schedule(valkey: Any, tmp_path: Path) -> None:
    tasks = [f"t{i}" for i in range(12)]
    with scene(valkey, tmp_path) as it, Host(CREW, it.config, processes=2, env=it.env) as host:
        faults = [KillWorker(host, every_s=1.0), KillServer(valkey, every_s=1.0, down_s=0.3)]
        with Chaos(faults, seed=11, most=8) as chaos:
            begin(it, tasks, 0.4)
            for task in tasks:
                it.mesh.get(task).result(timeout_s=45)
        assert chaos.struck(KillWorker) >= 2
        assert chaos.struck(KillServer) >= 1
        it.excused = 8 * chaos.struck(KillWorker)  # at most what two runs have in flight at once
        it.check(tasks)


def test_a_host_that_dies_is_replaced_by_its_leases(valkey: Any, tmp_path: Path) -> None:
    with scene(valkey, tmp_path) as it, Host(CREW, it.config, processes=2, env=it.env) as host:
        with Chaos([KillHost(host, every_s=0.3, down_s=0.5, victim=it.victim)], seed=1, most=1) as chaos:
            begin(it, ["a", "b"], 0.1)
            assert chaos.wait(10)
        it.check(["a", "b"])


def test_a_worker_that_stands_still_for_longer_than_its_lease(valkey: Any, tmp_path: Path) -> None:
    with scene(valkey, tmp_path) as it, Host(CREW, it.config, processes=2, env=it.env) as host:
        stop = StopWorker(host, every_s=0.3, for_s=LEASE_S + 1, victim=it.victim)
        with Chaos([stop], seed=3, most=1) as chaos:
            begin(it, ["a", "b"], 0.1)
            assert chaos.wait(10)
            it.check(["a", "b"])
        it.check(["a", "b"])  # the zombie woke; what it still had in hand is refused


def test_messages_lost_repeated_late_and_out_of_order(valkey: Any, tmp_path: Path) -> None:
    tasks = [f"t{i}" for i in range(6)]
    with scene(valkey, tmp_path) as it, Host(CREW, it.config, env=it.env):
        with DisturbMessages(valkey.broker_url, it.crew.broker_queues(), seed=5, loss=0.1) as thief:
            begin(it, tasks)
            it.check(tasks)
        assert thief.taken
        assert thief.repeated


@pytest.mark.parametrize("how", ["reset", "half_open"])
def test_links_that_end_with_and_without_a_word(valkey: Any, tmp_path: Path, how: str) -> None:
    with scene(valkey, tmp_path) as it, Proxy(valkey.url) as proxy:
        worker = WorkerProcess(CREW, it.through(proxy), env=it.env).start()
        try:
            it.mesh.run(it.crew.lead, "warm", id="warm", timeout_s=20)
            begin(it, ["a"])
            assert getattr(proxy, how)()
            it.excused = 4 if how == "half_open" else 0  # nobody renews while the silence is not yet known for death
            begin(it, ["b"])
            it.check(["warm", "a", "b"])
        finally:
            worker.kill()
            worker.join()


def test_cut_after_every_command_then_killed(valkey: Any, tmp_path: Path) -> None:
    """k = 1, 4, 7, …: the link is cut after the k-th command and the worker killed, until a run passes clean."""
    with scene(valkey, tmp_path, latency_s=0.0) as it:
        giver, k, cuts, tasks = Mesh(it.crew, config=it.config), 1, 0, []
        while True:
            task, cut = f"k{k}", []
            with Proxy(valkey.url) as proxy:
                worker = WorkerProcess(CREW, it.through(proxy), env=it.env)
                proxy.cut_after(k, lose="reply" if k % 2 else "command", then=lambda: (cut.append(1), worker.kill()))
                worker.start(wait=False)
                begin(it, [task])
                until = time.monotonic() + 10
                while not cut and it.mesh.get(task).status == "open":
                    assert time.monotonic() < until, f"neither cut nor done at {k}"
                    time.sleep(0.01)
                clean = not cut
                it.victim(worker.name, 0)
                worker.kill()
                worker.join()
                drive(giver.journal.release(worker.name, crashed=True, queues=it.crew.broker_queues()))
            tasks.append(task)
            if clean:
                break
            cuts += 1
            if cuts % 4 == 0:  # one sound worker finishes what four have left
                rescuer = WorkerProcess(CREW, it.config, env=it.env).start()
                for left in tasks:
                    assert it.mesh.get(left).result(timeout_s=20) == expected(left), left
                rescuer.kill()
                rescuer.join()
            k += 3
        assert cuts > 10
        rescuer = WorkerProcess(CREW, it.config, env=it.env).start()
        it.check(tasks)
        rescuer.kill()
        rescuer.join()
        giver.close()
