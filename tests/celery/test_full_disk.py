"""The disk of the store is full for a while: nothing is lost, and no finished call is thrown away."""

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from agentmesh import Agent, Crew
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.testing import FakeOpenAI, ValkeyServer

CALL_S = 0.5


class Asker(Agent):
    """Asks once."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 4 MB."""
    folder = Path("/tmp") / f"mesh-disk-{os.getpid()}"  # a socket's path is short
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        folder.rmdir()
        pytest.skip("a small disk is a mount, and we may not mount here")
    try:
        yield folder
    finally:
        ctypes.CDLL(None).umount2(str(folder).encode(), 2)  # MNT_DETACH
        folder.rmdir()


def test_a_full_disk_is_waited_for(small_disk: Path, eventually: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, ballast = ValkeyServer(small_disk), small_disk / "ballast"
    server.restart()
    with FakeOpenAI(lambda body: f"<{body['messages'][-1]['content']}>", latency_s=CALL_S) as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        config = Config(broker=server.broker_url, journal=server.url, lease_s=5.0, sweep_s=0.1)
        mesh = Mesh(Crew(Asker(), name="disk", model="openai:fake"), config=config, models=ModelRegistry())
        try:
            with mesh.worker(), redis.Redis.from_url(server.url) as client:
                runs = [mesh.start(mesh.crew.lead, f"t{i}") for i in range(20)]
                eventually(lambda: model.in_flight == 20)
                fill(ballast)
                eventually(lambda: refused(client))
                time.sleep(CALL_S + 1.0)  # all calls are answered meanwhile, and none can be written down
                assert refused(client)
                ballast.unlink()
                assert [run.result(timeout_s=20) for run in runs] == [f"<t{i}>" for i in range(20)]
                assert len(model.requests) == 20
                assert mesh.run(mesh.crew.lead, "after", timeout_s=20) == "<after>"
        finally:
            mesh.close()
            server.kill()


def fill(path: Path) -> None:
    """Until there is no room."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def refused(client: Any) -> bool:
    try:
        client.set("probe", "x" * 8192)
    except redis.ResponseError as e:
        return str(e).startswith("MISCONF")
    return False
