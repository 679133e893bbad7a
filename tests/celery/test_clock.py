"""A worker whose clock is an hour wrong: times are the store's, so nothing is early, late or done twice."""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import Host

CREW = str(Path(__file__).parent / "sleepers.py")
NAP_S = 0.5


# Python imports this at its start. (libfaketime breaks Python 3.11's time.sleep.)
WRONG = """
import os, time
right, wrong_s = time.time, 3600 * int(os.environ["HOURS_WRONG"])
time.time = lambda: right() + wrong_s
time.time_ns = lambda: int(time.time() * 1e9)
"""


def wrong(folder: Path, hours: int) -> dict[str, str]:
    """The environment of a host whose clock is wrong."""
    (folder / "sitecustomize.py").write_text(WRONG)
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    return {"PYTHONPATH": path, "HOURS_WRONG": str(hours)}


@pytest.mark.parametrize("hours", [1, -1])
def test_a_worker_with_a_wrong_clock(valkey: Any, tmp_path: Path, hours: int) -> None:
    log = tmp_path / "log"
    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=2.0, sweep_s=0.1, drain_s=2.0)
    mesh = Mesh(load_crew(CREW), config=config)
    env = {"SLEEPERS_LOG": str(log)}
    with Host(CREW, config, env=env), Host(CREW, config, env=env | wrong(tmp_path, hours)):
        began = time.time()
        runs = [mesh.start(mesh.crew.lead, NAP_S, run_id=f"r{i}") for i in range(20)]
        assert [run.result(timeout_s=20) for run in runs] == [f"r{i}" for i in range(20)]
        ended = time.time()
        events = [event for run in runs for event in run.events()]
    mesh.close()
    written = [line.split() for line in log.read_text().splitlines()]
    assert set(Counter(key for key, _ in written).values()) == {1}  # no lease ran out under anybody
    clocks = {round((float(at) - began) / 3600) for _, at in written}
    assert clocks == {0, hours}, "both workers had work, and one of them was wrong"
    assert all(began - 1 <= event.at_ms / 1000 <= ended + 1 for event in events)  # the store's time alone
    naps = [
        woken.at_ms - planned.at_ms
        for run in runs
        for planned, woken in zip(
            [e for e in run.events() if type(e).__name__ == "StepPlanned" and e.kind == "Sleep"],  # type: ignore[attr-defined]
            [e for e in run.events() if type(e).__name__ == "Woken"],
            strict=True,
        )
    ]
    assert all(NAP_S * 1000 <= nap < 10_000 for nap in naps)
