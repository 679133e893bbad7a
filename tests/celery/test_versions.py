"""Two versions of one crew file on the same queues, in real processes: each run is carried on by its own code alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from agentmesh.cli.runs import show_run
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.journal.events import StepDone
from agentmesh.mesh import Mesh
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import WorkerProcess

CREW = str(Path(__file__).parent / "versions.py")
Eventually = Callable[..., None]


@pytest.fixture
def config(valkey: Any) -> Config:
    return Config(broker=valkey.broker_url, journal=valkey.url, lease_s=10.0, sweep_s=0.2)


@pytest.fixture
def meshes(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Mesh]]:
    made = {}
    for version in ("1", "2"):
        monkeypatch.setenv("VERSIONS_CREW", version)
        made[version] = Mesh(load_crew(CREW), config=config)
    yield made
    for mesh in made.values():
        mesh.close()


@contextmanager
def worker(config: Config, version: str, flow: str = "") -> Iterator[WorkerProcess]:
    process = WorkerProcess(CREW, config, env={"VERSIONS_CREW": version, "VERSIONS_FLOW": flow}).start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def begin(meshes: dict[str, Mesh], version: str, run_id: str) -> Any:
    mesh = meshes[version]
    return mesh.start(mesh.crew.lead, 1, id=run_id)


def claims(valkey: Any, unit: str, for_s: float) -> int:
    """How often workers ask for a unit in this time, as the store sees it."""
    asked, until = 0, time.monotonic() + for_s
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client, client.monitor() as watched:
        for command in watched.listen():
            said = command["command"].replace("\\", "")
            asked += f'"unit":"{unit}"' in said and '"token"' in said
            if time.monotonic() > until:  # a worker that waits for messages says something ten times a second
                return asked
    return asked


def test_both_versions_end_each_by_its_own_code(config: Config, meshes: dict[str, Mesh]) -> None:
    with worker(config, "1"), worker(config, "2"):
        runs = [(v, begin(meshes, v, f"r{v}-{i}")) for i in range(4) for v in ("1", "2")]
        for version, run in runs:
            assert run.result(timeout_s=30) == [f"v{version}"] * 7


def test_an_old_run_waits_for_an_old_worker(
    config: Config, meshes: dict[str, Mesh], valkey: Any, eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    with worker(config, "2"):
        run = begin(meshes, "1", "old")
        eventually(lambda: run.waiting_for)
        assert [(a.n, a.why) for a in run.waiting_for] == [(1, "version:versions 1")]
        show_run("old", broker=config.broker, as_json=False, file=None)
        assert "no worker of crew 'versions' version '1'" in capsys.readouterr().out
        assert 1 <= claims(valkey, "s|old|1", for_s=2.0) <= 6  # ever less often, at last every 5 s
        assert begin(meshes, "2", "new").result(timeout_s=10) == ["v2"] * 7
        with worker(config, "1"):
            assert run.result(timeout_s=15) == ["v1"] * 7


def test_a_flow_that_asks_for_other_steps_is_held_with_the_step_named(
    config: Config, meshes: dict[str, Mesh], eventually: Eventually, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(meshes, "1", "changed")
    with worker(config, "1") as first:
        eventually(lambda: len(run.events()) >= 6)  # the third step is planned
        first.kill()
        first.join()
        release_on_death(config, meshes["1"].crew.queues.broker_names())(first.name, -9)
    with worker(config, "1", flow="other"):
        eventually(lambda: run.waiting_for, timeout_s=20)
        (item,) = run.waiting_for
        assert item.why.startswith("replay: step 3 was `Call 'old'` when first run and is now `Call 'new'`")
        show_run("changed", broker=config.broker, as_json=False, file=None)
        assert "step 3 was `Call 'old'`" in capsys.readouterr().out
        assert sum(isinstance(e, StepDone) for e in run.events()) == 2
    with worker(config, "1"):
        run.revive(item)
        assert run.result(timeout_s=15) == ["v1"] * 7
