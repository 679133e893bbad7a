"""A queue in front of model servers: real workers, one server killed under load; no step is lost, none ends twice."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from agentmesh.config import Config
from agentmesh.journal.events import StepDone, StepRetried
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeOpenAI, Host

CREW = str(Path(__file__).parent / "servers_crew.py")
COUNT, LATENCY_S = 120, 0.5
NEVER_S = 60  # the killed server never ends its requests


def answer(body: dict[str, Any]) -> str:
    return f"<{body['messages'][-1]['content']} of {body['model']}>"


def test_a_server_killed_under_load(valkey: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [sys.executable, "-m", "agentmesh.testing.fake_openai", "--latency", str(NEVER_S)]
    doomed = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert doomed.stdout is not None
    url = doomed.stdout.readline().strip()
    with FakeOpenAI(answer, latency_s=LATENCY_S) as stays:
        monkeypatch.setenv("SERVER_URLS", f"{stays.url} {url}")
        config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=3.0, sweep_s=0.2)
        mesh = Mesh(load_crew(CREW), config=config)
        try:
            with Host(CREW, config, processes=2):
                run = mesh.start(mesh.crew.lead, COUNT, run_id="load")
                eventually(lambda: stays.in_flight >= 20)
                os.kill(doomed.pid, signal.SIGKILL)
                said = run.result(timeout_s=60)
                cut = check(mesh, "load")
                assert cut > 0  # it had steps in flight, and they went to the other
                assert said == [f"<w{i} of big>" for i in range(COUNT)]
                with FakeOpenAI(answer, port=int(url.split(":")[2].split("/")[0])) as back:
                    deadline = time.monotonic() + 20
                    while not back.requests:  # it is asked again once it is seen to answer
                        assert time.monotonic() < deadline
                        mesh.run(mesh.crew.lead, 8, timeout_s=30)
        finally:
            mesh.close()
            doomed.kill()
            doomed.communicate()


def check(mesh: Mesh, run_id: str) -> int:
    """Each step ended once; how many attempts were cut off."""
    cut = 0
    tree = mesh.get(run_id).tree()
    assert len(tree) == COUNT + 1
    for member in tree:
        events = member.events()
        ends = Counter(e.n for e in events if isinstance(e, StepDone))
        assert set(ends.values()) == {1}
        cut += sum(isinstance(e, StepRetried) for e in events)
    return cut
