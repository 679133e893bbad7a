"""A user's own worker, `celery -A proj worker`, on every pool: right answers, leases that last, kills that cost little."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from agentmesh import Crew
from agentmesh.celery.rabbitmq import inspect_broker
from agentmesh.config import Config
from agentmesh.mesh import Mesh

HERE = Path(__file__).parent
POOLS = ("prefork", "threads", "solo", "gevent", "eventlet", "custom")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*setex.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Theirs:
    """Their worker process, their app as a client sees it, and the file their tools write."""

    def __init__(self, valkey: Any, folder: Path, module: Any, process: "subprocess.Popen[bytes]") -> None:
        self.valkey, self.log, self.module, self.process = valkey, folder / "log", module, process

    @property
    def lines(self) -> list[tuple[str, int]]:
        """What the tools noted: their argument, and the process they ran in."""
        return [(name, int(pid)) for name, pid in (line.split() for line in self.log.read_text().splitlines())]


@contextmanager
def theirs(
    valkey: Any,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    pool: str,
    *options: str,
    visibility_s: str = "3600",
    broker: Any = None,
) -> Iterator[Theirs]:
    env = {
        "THEIR_BROKER": (broker or valkey).broker_url, "THEIR_BACKEND": valkey.broker_url, "THEIR_JOURNAL": valkey.url,
        "THEIR_LOG": str(folder / "log"), "THEIR_VISIBILITY_S": visibility_s, "CELERY_CUSTOM_WORKER_POOL": "agentmesh.celery.pool:TaskPool",
    }  # fmt: skip
    (folder / "log").touch()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
    sys.modules.pop("their_app", None)
    argv = [sys.executable, "-m", "celery", "-A", "their_app", "worker", "-Q", "agentmesh.inside.main,celery", "-P", pool,
            "-c", "4", "--without-mingle", "--without-gossip", *options]  # fmt: skip
    with (folder / "worker.log").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, process_group=0)
    import their_app

    try:
        yield Theirs(valkey, folder, their_app, process)
    except BaseException:
        print((folder / "worker.log").read_text())
        raise
    finally:
        with_group = os.getpgid(process.pid) if process.poll() is None else 0
        if with_group:
            os.killpg(with_group, signal.SIGKILL)
        process.wait()
        their_app.mesh.close()
        their_app.app.close()


@pytest.mark.parametrize("pool", POOLS)
def test_on_rabbitmq(valkey: Any, rabbitmq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    """Our queue is a quorum queue, whoever comes first; theirs stays what it was."""
    with theirs(valkey, tmp_path, monkeypatch, pool, broker=rabbitmq) as it:
        m = it.module
        assert m.mesh.run(m.Team(), "a", timeout_s=20) == "<a0,a1,a2,a3>"
        assert m.shout.delay("tea").get(timeout=10) == "TEA"
        assert inspect_broker(m.app, ["agentmesh.inside.main"]).other == {}
        assert list(inspect_broker(m.app, ["celery"]).other) == ["celery"]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool(valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str) -> None:
    """Lease 1 s: two calls of 2.5 s outlast it; messages come again after 1 s and are refused."""
    with theirs(valkey, tmp_path, monkeypatch, pool, visibility_s="1") as it:
        m = it.module
        both = [m.mesh.start(m.Long(), f"long{i}") for i in range(2)]
        assert m.mesh.run(m.Team(), "a", timeout_s=20) == "<a0,a1,a2,a3>"
        assert m.shout.delay("x").get(timeout=10) == "X"
        assert [run.result(timeout_s=20) for run in both] == ["long0", "long1"]
        assert Counter(name for name, _ in it.lines) == Counter(["a0", "a1", "a2", "a3", "long0", "long1"])
        if pool == "prefork":
            assert it.process.pid not in {pid for _, pid in it.lines}


def test_a_pools_process_that_dies_is_heard_of(
    valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    """With a lease of 1 s only the parent can have given it back this soon; one task a child is lived through too."""
    with theirs(valkey, tmp_path, monkeypatch, "prefork", "--max-tasks-per-child", "1", "--autoscale", "4,1") as it:
        m = it.module
        assert m.mesh.run(m.Team(), "a", timeout_s=20) == "<a0,a1,a2,a3>"
        run = m.mesh.start(m.Dying(), "d")
        assert run.result(timeout_s=20) == "d"
        assert [name for name, _ in it.lines].count("d") == 2
        with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
            assert client.zcard("agentmesh:leased") == 0


def test_a_worker_that_is_told_to_stop_drains_and_gives_back(
    valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    with theirs(valkey, tmp_path, monkeypatch, "prefork") as it:
        m = it.module
        run = m.mesh.start(m.Long(), "slow")
        eventually(lambda: it.lines)
        it.process.terminate()
        assert it.process.wait(20) == 0
        assert [type(e).__name__ for e in run.events()].count("StepDone") == 1
        with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
            assert not list(client.scan_iter("agentmesh:wl:*"))


def test_two_apps_and_their_conf(valkey: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two apps in one process, each with a worker thread; making a mesh changes no setting of either."""
    from celery import Celery

    monkeypatch.setenv("THEIR_LOG", str(tmp_path / "log"))
    apps = [Celery(f"app{i}", broker=valkey.broker_url, set_as_current=False) for i in range(2)]
    apps[1].conf.broker_transport_options = {"global_keyprefix": "pre:"}  # kombu's to add, so not for scripts to push
    before = [settings(app) for app in apps]
    from agentmesh import Agent
    from agentmesh.testing import ScriptedModel, says

    class Echo(Agent):
        """Says what it is told."""

    meshes = [
        Mesh(Crew(Echo(), name=f"c{i}", model=ScriptedModel(lambda p, i=i: says(f"{i}{p.messages[-1].text}"))), app=app,
             journal=valkey.url, config=Config(sweep_s=0.2)) for i, app in enumerate(apps)
    ]  # fmt: skip
    assert [settings(app) for app in apps] == before
    with meshes[0].worker(), meshes[1].worker():
        assert [mesh.run(Echo(), "x", timeout_s=20) for mesh in meshes] == ["0x", "1x"]
    assert [settings(app) for app in apps] == before
    for mesh, app in zip(meshes, apps, strict=True):
        mesh.close()
        app.close()


def settings(app: Any) -> dict[str, Any]:
    """Without `include`, in which Celery's own worker notes the modules it has loaded."""
    app.finalize()
    return {k: v for k, v in dict(app.conf).items() if k != "include"}
