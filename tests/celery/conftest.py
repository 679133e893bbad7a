"""A real Valkey for the tests of this folder."""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from agentmesh.celery.valkey import server_binary

READY_S = 10.0


class ValkeyServer:
    """A Valkey of the tests' own, on a unix socket, with an append-only file that outlives `kill`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "v.sock"
        self.url = f"unix://{self.socket}?db=0"
        self.broker_url = f"redis+socket://{self.socket}?virtual_host=0"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self.process is not None and self.process.poll() is None

    def restart(self) -> None:
        """Start it, over the data it had; come back when it answers."""
        argv = [str(server_binary()), "--port", "0", "--unixsocket", str(self.socket), "--dir", str(self.folder)]
        argv += ["--save", "", "--appendonly", "yes", "--loglevel", "warning", "--logfile", "valkey.log"]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        until = time.monotonic() + READY_S
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    if time.monotonic() > until:
                        raise
                    time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL; the data stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def flush(self) -> None:
        """An empty server, alive."""
        if not self.alive:
            self.restart()
        with redis.Redis.from_url(self.url) as client:
            client.flushall()


@pytest.fixture(scope="session")
def _valkey_server() -> Iterator[ValkeyServer]:
    folder = Path(tempfile.mkdtemp(prefix="mesh-"))  # pytest's own folders are too long for a socket's path
    server = ValkeyServer(folder)
    try:
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def valkey(_valkey_server: ValkeyServer) -> ValkeyServer:
    """An empty Valkey: `.url` for redis-py, `.broker_url` for Celery, `.kill()` and `.restart()` for chaos."""
    _valkey_server.flush()
    return _valkey_server


@pytest.fixture
def eventually():
    """`eventually(condition)` waits until it is true, and fails after 15 s."""

    def wait(condition, timeout_s=15.0):
        until = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(redis.RedisError):
                if condition():
                    return
            assert time.monotonic() < until, f"not within {timeout_s} s"
            time.sleep(0.005)

    return wait
