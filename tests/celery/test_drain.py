"""Workers that are drained one after another during runs: nothing is executed twice, and nothing waits for a lease to expire."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.engine.run import Run
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeOpenAI, Fault
from agentmesh.worker.asyncio_worker import worker_command
from agentmesh.worker.supervisor import Supervisor

NEVER_S = 600.0  # no lease runs out in these tests
SOON_S = 12.0  # to the end of a run of a second and a half, on a busy machine


class Scene:
    """A mesh, two supervised workers, the oracle."""

    def __init__(self, valkey: Any, server: FakeOpenAI, oracle: Any, drain_s: float) -> None:
        self.server, self.oracle = server, oracle
        config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=NEVER_S, sweep_s=0.2, drain_s=drain_s)
        self.crew = load_crew(oracle.crew)
        self.mesh = Mesh(self.crew, config=config)
        self.supervisor = Supervisor(
            [worker_command(config, crews=[oracle.crew], queues=[], concurrency=0)] * 2, drain_s=drain_s, output=subprocess.DEVNULL,
            on_death=release_on_death(config, self.crew.queues.broker_names()),
            env=oracle.env(server),
        )  # fmt: skip
        self.runs: list[Run[str]] = []

    def start(self) -> Run[str]:
        task = f"t{len(self.runs)}"
        self.runs.append(self.mesh.start(self.crew.lead, task, run_id=task))
        return self.runs[-1]

    def asked(self) -> Counter[str]:
        return self.oracle.asked(self.server)

    def attempts(self, run: Run[str]) -> set[int]:
        return {e.attempt for _, e in self.oracle.ends(self.mesh, run.run_id)}


@contextmanager
def scene(valkey: Any, oracle: Any, drain_s: float = 10.0) -> Iterator[Scene]:
    with FakeOpenAI(oracle.answer, latency_s=0.2) as server:
        it = Scene(valkey, server, oracle, drain_s)
        it.supervisor.start()
        try:
            assert it.supervisor.wait_ready(20)
            yield it
        finally:
            it.supervisor.stop(now=True)
            it.supervisor.join(10)
            it.mesh.close()


def test_a_rolling_restart_under_load(valkey: Any, oracle: Any, eventually: Any) -> None:
    with scene(valkey, oracle) as it:
        for turn in range(2):
            eventually(lambda: it.supervisor.health == (2, 2))
            pid = list(it.supervisor.pids.values())[turn]
            tell = time.monotonic() + 0.3
            while pid in it.supervisor.pids.values():  # load before, while and until it has left
                it.start()
                if tell and time.monotonic() > tell:
                    os.kill(pid, signal.SIGTERM)
                    tell = 0.0
                time.sleep(0.05)
        last = time.monotonic()
        for run in it.runs:
            assert run.result(timeout_s=15) == oracle.expected(run.run_id)
            assert it.attempts(run) == {1}
        assert time.monotonic() - last < SOON_S
        assert set(it.asked().values()) == {1}
        assert len(it.asked()) == 9 * len(it.runs)
        assert oracle.looked_up() == oracle.words(*(r.run_id for r in it.runs))


def test_what_a_leaving_worker_cannot_end_goes_on_at_once(valkey: Any, oracle: Any, eventually: Any) -> None:
    """One call hangs longer than the drain: it is asked again, and what had ended is not."""
    with scene(valkey, oracle, drain_s=0.5) as it:
        it.server.faults.append(Fault(hang=True))
        run = it.start()
        eventually(lambda: (it.server.answered, it.server.in_flight) == (6, 1))
        for pid in it.supervisor.pids.values():
            os.kill(pid, signal.SIGTERM)
        told = time.monotonic()
        assert run.result(timeout_s=15) == oracle.expected(run.run_id)
        assert time.monotonic() - told < SOON_S
        assert sorted(it.asked().values()) == [1] * 8 + [2]


def test_messages_that_a_worker_took_and_never_began_are_sent_again(valkey: Any, oracle: Any) -> None:
    with scene(valkey, oracle) as it:
        asleep, _ = it.supervisor.pids.values()
        os.kill(asleep, signal.SIGSTOP)  # its blocking pop stands, and takes what comes
        runs = [it.start() for _ in range(6)]
        os.kill(asleep, signal.SIGKILL)
        killed = time.monotonic()
        for run in runs:
            assert run.result(timeout_s=15) == oracle.expected(run.run_id)
        assert time.monotonic() - killed < SOON_S
        assert set(it.asked().values()) == {1}
