"""A tool that kills its process among 500 steps in flight: the others end, only it is held. Real processes."""

import subprocess
from pathlib import Path
from typing import Any

from agentmesh.boot import load_crew
from agentmesh.celery.supervise import Supervisor
from agentmesh.cli.child import spec_of
from agentmesh.cli.worker import giver_back
from agentmesh.config import Config
from agentmesh.event import StepDone, StepQuarantined
from agentmesh.mesh import Mesh

CREW = str(Path(__file__).parent / "poisoned.py")


def test_a_poison_among_500(valkey: Any, tmp_path: Path, eventually: Any) -> None:
    log = tmp_path / "log"
    log.touch()
    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=10.0, sweep_s=0.2, drain_s=3.0)
    crew = load_crew(CREW)
    mesh = Mesh(crew, config=config)
    supervisor = Supervisor(
        [spec_of(config, crews=[CREW], queues=[], concurrency=0)], drain_s=5, output=subprocess.DEVNULL,
        on_death=giver_back(config, crew.broker_queues()), env={"POISON_LOG": str(log)},
    )  # fmt: skip
    supervisor.start()
    try:
        run = mesh.start(crew.lead, "x", id="p")
        eventually(lambda: run.waiting_for, timeout_s=60)
        eventually(lambda: sum(isinstance(e, StepDone) for e in run.events()) == 499, timeout_s=30)
        (item,) = run.waiting_for
        assert (item.n, item.why, item.tool) == (8, "quarantined", "work")
        assert [e.crashes for e in run.events() if isinstance(e, StepQuarantined)] == [3]
        assert log.read_text().split().count("7") <= 10
        run.resolve(item, "failed", by="ana")
        assert run.result(timeout_s=10) == 500
    finally:
        supervisor.stop(now=True)
        supervisor.join(10)
        mesh.close()
