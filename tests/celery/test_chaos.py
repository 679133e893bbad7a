"""Faults on schedule against real processes and a real Valkey, with the public kit; the fake server and a file count.

The long tier is `python bench/chaos.py --full`.
"""

import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.registry import runtime_of
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import (
    Chaos,
    DisturbMessages,
    FakeOpenAI,
    Host,
    KillServer,
    KillWorker,
    Proxy,
    StopWorker,
    WorkerProcess,
)
from agentmesh.testing.proxy import Commands

SMALL = str(Path(__file__).parent / "small.py")
MOST_K = 60


class Scene:
    """A mesh beside a store, the oracle, and what the workers are told."""

    def __init__(self, valkey: Any, server: FakeOpenAI, oracle: Any, crew: str) -> None:
        self.valkey, self.server, self.oracle, self.crew_file = valkey, server, oracle, crew
        self.env = oracle.env(server)
        self.config = self.through(valkey)
        self.mesh = Mesh(load_crew(crew), config=self.config)
        self._store = redis.Redis.from_url(valkey.url, decode_responses=True)
        self.held: Counter[str] = Counter()

    def through(self, place: Any) -> Config:
        """What a worker is told that reaches the store there."""
        broker = getattr(place, "broker_url", place.url)
        return Config(broker=broker, journal=place.url, lease_s=2.0, sweep_s=0.2, drain_s=3.0)

    def worker(self, place: Any = None) -> WorkerProcess:
        return WorkerProcess(self.crew_file, self.through(place or self.valkey), env=self.env).start()

    def start(self, agent: str, task: str) -> Any:
        return self.mesh.start(self.mesh.crew.agent(agent), task, run_id=task)

    def note(self, worker: str, pid: int) -> None:
        """What a victim holds, by kind; a store that is down as well is asked until it is back."""
        until = time.monotonic() + 5
        while True:
            try:
                for unit in self._store.smembers(f"agentmesh:wl:{worker}"):
                    letter, run, n = (*unit.split("|"), "")[:3]
                    record = self._store.hget(f"agentmesh:st:{run}", n or letter) or ""
                    entry = json.loads(record) if record.startswith("{") else {}
                    self.held["Ask" if entry.get("limited") else entry.get("kind", letter)] += 1
                return
            except redis.RedisError:
                assert time.monotonic() < until
                time.sleep(0.02)

    def give_back(self, worker: WorkerProcess) -> None:
        crew = self.mesh.crew
        journal = runtime_of(self.mesh.app, crew.name).journal
        run_sync(journal.release(worker.name, crashed=True, queues=crew.queues.broker_names()))

    def asked_again(self) -> int:
        """LLM calls beyond one a step."""
        return int(self.oracle.asked_again(self.server))

    def ended_twice(self, *runs: str) -> list[str]:
        """Steps with more than one end."""
        return list(self.oracle.ended_twice(self.mesh, *runs))

    def check(self, *tasks: str, timeout_s: float = 30) -> None:
        for task in tasks:
            assert self.mesh.get(task).result(timeout_s=timeout_s) == self.oracle.expected(task)
        assert self.ended_twice(*tasks) == []
        assert self.asked_again() <= self.held["Ask"]

    def close(self) -> None:
        self.mesh.close()
        self._store.close()


@pytest.fixture
def scene(valkey: Any, oracle: Any) -> Iterator[Any]:
    """`scene(crew, answer)`: at most one a test."""
    with contextlib.ExitStack() as stack:

        def make(crew: str = oracle.crew, how: Any = oracle.answer, latency_s: float = 0.05) -> Scene:
            it = Scene(valkey, stack.enter_context(FakeOpenAI(how, latency_s=latency_s)), oracle, crew)
            stack.callback(it.close)
            return it

        yield make


def test_workers_and_the_store_are_killed_on_schedule(scene: Any, valkey: Any) -> None:
    it = scene()
    with Host(it.crew_file, it.config, processes=2, env=it.env) as host:
        faults = [KillWorker(host, every_s=1.0, victim=it.note), KillServer(valkey, every_s=2.0)]
        tasks = []
        with Chaos(faults, seed=4) as chaos:
            while chaos.struck(KillWorker) < 5 or not chaos.struck(KillServer):
                tasks.append(f"t{len(tasks)}")
                it.start("Lead", tasks[-1])
                time.sleep(0.3)
                assert len(tasks) < 100, chaos.log
        it.check(*tasks)


@pytest.mark.parametrize("lose", ["reply", "command"])
def test_the_link_cut_after_each_command_and_the_worker_killed(scene: Any, valkey: Any, lose: Any) -> None:
    it = scene(SMALL, lambda body: f"said {body['messages'][-1]['content']}", 0.0)
    with Proxy(valkey.url) as proxy:
        for k in range(1 + (lose == "command"), MOST_K, 2):  # the odd ones lose the reply, the even ones the command
            worker, cut = it.worker(proxy), threading.Event()
            task = f"k{k}"

            def killed(worker: Any = worker, cut: Any = cut) -> None:
                worker.kill()
                cut.set()

            proxy.cut_after(k, lose=lose, then=killed)
            run = it.start("Small", task)
            while not cut.wait(0.002) and run.head().status == "open":
                pass
            after = None
            if cut.is_set():
                worker.join()
                it.note(worker.name, worker.pid)
                it.give_back(worker)
                after = it.worker()
            assert run.result(timeout_s=15) == f"said {task}: ['{task.upper()}A', '{task.upper()}B']", k
            assert it.ended_twice(task) == [], k
            assert it.asked_again() <= it.held["Ask"], k
            proxy.heal()
            for one in filter(None, (after, worker)):
                one.kill()
                one.join()
            if after is None:
                break
        else:
            pytest.fail(f"no run passed clean until k={MOST_K}")
    assert k > 8  # a run is more commands than that: the loop was in the midst of it


def test_a_worker_stopped_for_longer_than_its_lease(scene: Any) -> None:
    it = scene()
    workers = [it.worker(), it.worker()]
    stop = StopWorker(*workers, every_s=0.2, for_s=4.0, victim=it.note)
    try:
        with Chaos([stop], seed=2, most=1) as chaos:
            tasks = [f"t{i}" for i in range(6)]
            for task in tasks:
                it.start("Lead", task)
            assert chaos.wait(10)
            it.check(*tasks)
        assert chaos.struck(StopWorker) == 1
        it.check(*tasks)  # it woke, and its commits were refused
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def test_links_that_are_reset_or_half_open(scene: Any, valkey: Any) -> None:
    it = scene()
    with Proxy(valkey.url) as proxy:
        worker = it.worker(proxy)
        try:
            assert it.start("Lead", "before").result(timeout_s=20) == it.oracle.expected("before")
            it.start("Lead", "reset")
            assert proxy.reset() > 0
            assert it.mesh.get("reset").result(timeout_s=20) == it.oracle.expected("reset")
            it.start("Lead", "half")
            time.sleep(0.05)
            it.note(
                worker.name, worker.pid
            )  # it cannot renew for longer than its lease of 2 s: what it held may be repeated
            assert proxy.half_open() > 0
            it.check("before", "reset", "half", timeout_s=30)
        finally:
            worker.kill()
            worker.join()


def test_messages_lost_repeated_and_out_of_order(scene: Any, valkey: Any) -> None:
    it = scene()
    worker = it.worker()
    try:
        with DisturbMessages(valkey.broker_url, it.mesh.crew.queues.broker_names(), seed=3) as disturbed:
            tasks = [f"t{i}" for i in range(6)]
            for task in tasks:
                it.start("Lead", task)
            it.check(*tasks, timeout_s=40)
        assert disturbed.repeated
        assert it.asked_again() == 0
        assert it.oracle.looked_up() == it.oracle.words(*tasks)
    finally:
        worker.kill()
        worker.join()


def test_a_host_dies_with_everything_on_it(scene: Any, eventually: Any) -> None:
    it = scene()
    with Host(it.crew_file, it.config, processes=2, env=it.env) as one, Host(it.crew_file, it.config, env=it.env):
        tasks = [f"t{i}" for i in range(8)]
        for task in tasks:
            it.start("Lead", task)
        eventually(lambda: it.server.requests)
        for name, pid in one.pids.items():
            it.note(name, pid)
        asked = len(it.server.requests)
        one.kill()
        it.held["Ask"] += max(0, len(it.server.requests) - asked) + it.server.in_flight  # between the look and the kill
        it.check(*tasks)
        assert one.pid == 0
        assert one.pids == {}


def test_what_may_run_once_never_runs_twice(scene: Any) -> None:
    it, rng, runs = scene(SMALL), random.Random(5), []
    for i in range(8):
        runs += [it.start("Payer", f"p{i}{x}") for x in "ab"]
        worker = it.worker()
        time.sleep(rng.uniform(0.02, 0.1))
        worker.kill()
        worker.join()
        it.give_back(worker)
    worker = it.worker()
    try:
        until, doubts = time.monotonic() + 20, 0
        while any(run.head().status == "open" for run in runs):
            assert time.monotonic() < until
            for run in runs:
                for item in run.waiting_for():
                    assert item.why == "in_doubt"
                    run.resolve(item, "done", value="as a person says")
                    doubts += 1
            time.sleep(0.02)
        assert doubts, "no kill hit a tool in the midst"
        executed = it.oracle.looked_up()
        assert set(executed.values()) == {1}, executed.most_common(3)
    finally:
        worker.kill()
        worker.join()


def test_the_same_seed_strikes_alike() -> None:
    class Nothing:
        every_s = 0.005

        def __init__(self) -> None:
            self.drawn: list[float] = []

        def strike(self, rng: random.Random) -> str:
            self.drawn.append(rng.random())
            return "nothing"

        def heal(self) -> None:
            pass

    drawn = []
    for seed in (7, 7, 8):
        fault = Nothing()
        with Chaos([fault], seed=seed, most=5) as chaos:
            assert chaos.wait(5)
        drawn.append(fault.drawn)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_fault_that_cannot_be_done_is_said() -> None:
    class Broken:
        every_s = 0.001

        def strike(self, rng: random.Random) -> str:
            raise OSError("no such process")

        def heal(self) -> None:
            pass

    chaos = Chaos([Broken()], seed=1)
    with pytest.raises(RuntimeError, match="no such process"), chaos:
        assert chaos.wait(5)


def test_commands_are_found_however_they_are_torn() -> None:
    said = b"*1\r\n$4\r\nPING\r\n*3\r\n$3\r\nSET\r\n$1\r\na\r\n$4\r\n\r\n*1\r\nPING\r\n"
    whole = Commands().ends(said)
    assert len(whole) == 3
    for size in (1, 2, 3, 7):
        commands, found = Commands(), []
        for at in range(0, len(said), size):
            found += [at + end for end in commands.ends(said[at : at + size])]
        assert found == whole, size
