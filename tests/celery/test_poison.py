"""A tool that kills its process among 500 steps in flight: the others end, only it is held. Real processes."""

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.journal.events import StepDone, StepQuarantined
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker import asyncio_worker
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.standby import standby_workers
from agentmesh.worker.supervisor import Supervisor

CREW = str(Path(__file__).parent / "poisoned.py")


def test_a_poison_among_500(valkey: Any, tmp_path: Path, eventually: Any) -> None:
    log = tmp_path / "log"
    log.touch()

    def pids(what: str) -> list[str]:
        return [pid for said, pid in (line.split() for line in log.read_text().splitlines()) if said == what]

    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=10.0, sweep_s=0.2, drain_s=3.0)
    crew = load_crew(CREW)
    mesh = Mesh(crew, config=config)
    deaths: list[str] = []
    give_back = release_on_death(config, crew.queues.broker_names())

    def on_death(name: str, code: int) -> None:
        deaths.append(name)
        give_back(name, code)

    supervisor = Supervisor(
        worker_commands(config, {CREW: crew}, suspects="exclude"), spares=standby_workers(config, {CREW: crew}), drain_s=5,
        output=subprocess.DEVNULL, on_death=on_death, env={"POISON_LOG": str(log)},
    )  # fmt: skip
    supervisor.start()
    try:
        assert supervisor.wait_ready(20)
        run = mesh.start(crew.lead, "x", id="p")
        others = [mesh.start(crew.agent("Other"), f"early{i}") for i in range(5)]
        eventually(lambda: len(deaths) >= 2, timeout_s=30)
        others += [mesh.start(crew.agent("Other"), f"late{i}") for i in range(5)]
        eventually(lambda: run.waiting_for, timeout_s=60)
        eventually(lambda: sum(isinstance(e, StepDone) for e in run.events()) == 499, timeout_s=30)
        (item,) = run.waiting_for
        assert (item.n, item.why, item.tool) == (8, "quarantined", "work")
        assert [e.crashes for e in run.events() if isinstance(e, StepQuarantined)] == [3]
        assert [other.result(timeout_s=20) for other in others] == [20] * 10
        # After the second death suspects have a process of their own, and nobody else shares it.
        poisoned, (ordinary,) = pids("7"), [pid for name, pid in supervisor.pids.items() if "spare" not in name]
        assert len(poisoned) == len(deaths) <= 10
        assert [name for name in deaths if "spare" not in name] == deaths[:2]
        assert {pid for i in range(5) for pid in pids(f"late{i}")} == {str(ordinary)}
        assert supervisor.health == (1, 1)
        run.resolve(item, "failed", by="ana")
        assert run.result(timeout_s=10) == 500
    finally:
        supervisor.stop(now=True)
        supervisor.join(10)
        mesh.close()


def test_a_worker_for_suspects_leaves_when_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio_worker, "POLL_S", 0.01)
    monkeypatch.setattr(asyncio_worker, "IDLE_EXIT_S", 0.1)
    wanted = [True, False] * 20  # never unwanted for long
    asyncio_worker.wait_until_idle(threading.Event(), lambda: bool(wanted) and wanted.pop())
    assert not wanted
    over = threading.Event()
    over.set()
    asyncio_worker.wait_until_idle(over, lambda: pytest.fail("it was told to stop"))
