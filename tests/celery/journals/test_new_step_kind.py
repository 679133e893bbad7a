"""The kinds of steps of tests/unit/test_new_step_kind.py in a worker process, over the scripts of a real Valkey."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli.runs import decide, show_run
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import WorkerProcess

CREW = str(Path(__file__).parents[2] / "unit" / "test_new_step_kind.py")
VALUE = ["a for r/1", "ana", ["well", "what", "do", "you", "think?"], ["b for r/4", "c for r/6"]]


def test_new_kinds_run_in_a_worker(valkey: Any, eventually: Callable[..., None], capsys: Any) -> None:
    config = Config(broker=valkey.broker_url, journal=valkey.url, sweep_s=0.2)
    mesh = Mesh(load_crew(CREW), config=config)
    worker = WorkerProcess(CREW, config, env={"TOMORROW_S": "0.3"}).start()
    try:
        run = mesh.start(mesh.crew.lead, "7", run_id="r")
        eventually(lambda: run.waiting_for())
        show_run("r", broker=config.broker, as_json=False, file=None)
        shown = capsys.readouterr().out
        assert "StepPlanned    1 Fetch page" in shown
        assert "StepPlanned    2 Signal paid" in shown
        assert "waiting: signal:paid (run r, step 2, paid {'about': 'order 7'})" in shown
        with pytest.raises(Exception, match="step 2 of run r is not waiting for this"):
            decide("r", "approve", n=2, broker=config.broker)
        decide("r", "resolve", n=2, action="failed", broker=config.broker)
        eventually(lambda: run.status() == "failed")
        again = run.retry()
        eventually(lambda: again.waiting_for())
        decide("r~2", "resolve", n=2, action="done", value='{"by": "ana"}', broker=config.broker)
        assert again.result(timeout_s=30) == VALUE
    finally:
        worker.kill()
        worker.join()
        mesh.close()
