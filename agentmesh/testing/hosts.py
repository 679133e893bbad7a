"""Worker processes for tests that kill them: a host under a real supervisor, and single workers by the hundred. Linux only."""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from agentmesh.config import Config

READY_S = 30.0
WORKER = "agentmesh.worker.asyncio_worker"  # by name, as the command line starts it: packages above this one are not imported


class Host:
    """The workers of one machine: `agentmesh worker CREW --processes N` as a process of its own.

    Args:
        crew: the crew file.
        config: how the workers are set; its broker must be named.
        env: added to the environment of all its processes.
        output: where their stdout and stderr go; nowhere when None.

    Attributes:
        pid: the supervisor's; 0 while the host is down.
    """

    def __init__(
        self, crew: str, config: Config, *, processes: int = 1, env: Mapping[str, str] | None = None,
        output: "int | IO[Any] | None" = None,
    ) -> None:  # fmt: skip
        self._argv = [sys.executable, "-m", "agentmesh.cli.main", "worker", crew, "--processes", str(processes)]
        settings = {f"AGENTMESH_{name.upper()}": str(value) for name, value in config.model_dump(mode="json").items()}
        self._env = {**os.environ, **settings, **(env or {})}
        self._output = subprocess.DEVNULL if output is None else output
        self._processes = processes
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The supervisor's process id; 0 while the host is down."""
        return self._supervisor.pid if self._supervisor is not None and self._supervisor.poll() is None else 0

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the workers, by their names in leases."""
        return children(self.pid) if self.pid else {}

    def start(self) -> "Host":
        """Start the supervisor, which starts the workers."""
        self._supervisor = subprocess.Popen(self._argv, env=self._env, stdout=self._output, stderr=self._output)
        return self

    def wait(self, timeout_s: float = READY_S) -> None:
        """Come back when every worker consumes.

        Raises:
            TimeoutError: not within `timeout_s`, or the host ended.
        """
        until = time.monotonic() + timeout_s
        while (ready := sum(_is_ready(self.pid, pid) for pid in self.pids.values())) < self._processes:
            if time.monotonic() > until or not self.pid:
                raise TimeoutError(f"the host has {ready} of {self._processes} workers after {timeout_s} s")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to supervisor and workers at once, as when the power fails: no lease is released."""
        if self._supervisor is not None:
            workers = self.pids
            self._supervisor.kill()  # first, or it would see its workers die and release their leases
            for pid in workers.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._supervisor.wait()

    def stop(self, timeout_s: float = 40.0) -> int:
        """Drain it, as SIGTERM does; the supervisor's return code."""
        if self._supervisor is None:
            return 0
        self._supervisor.terminate()
        try:
            return self._supervisor.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def __enter__(self) -> "Host":
        self.start().wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def children(pid: int) -> dict[str, int]:
    """The worker processes that a supervisor has now, by name."""
    pids = {}
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                with suppress(OSError, ValueError):
                    argv = Path(f"/proc/{child}/cmdline").read_text().split("\0")
                    pids[argv[argv.index("--worker-name") + 1]] = int(child)
    return pids


def _is_ready(supervisor: int, pid: int) -> bool:
    """Whether a worker has told its supervisor that it consumes, after which it closes the pipe between them."""
    with suppress(OSError, ValueError):
        argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        number = argv[argv.index("--ready-fd") + 1]
        ours = {os.readlink(fd) for fd in Path(f"/proc/{supervisor}/fd").iterdir()}
        try:
            link = os.readlink(f"/proc/{pid}/fd/{number}")  # its number may be another file's by now
            return link not in ours or not link.startswith("pipe:")
        except FileNotFoundError:
            return Path(f"/proc/{pid}/fd").exists()
    return False


class WorkerProcess:
    """One worker process without a supervisor, forked from one that has imported everything: ready in milliseconds.

    Args:
        env: set in the process before it begins.

    Attributes:
        name: its name in leases.
    """

    def __init__(
        self, crew: str, config: Config, *, env: Mapping[str, str] | None = None, concurrency: int = 0
    ) -> None:
        self.name = f"forked-{uuid.uuid4().hex[:8]}"
        spec = {"crews": [crew], "queues": [], "concurrency": concurrency, "config": config.model_dump(mode="json")}
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([WORKER, "agentmesh.models.http"])
        self._stdin, self._alive = context.Pipe(duplex=False)
        self._ready, self._ready_writer = context.Pipe(duplex=False)
        arguments = (json.dumps(spec), self.name, self._stdin, self._ready_writer, dict(env or {}))
        self._process = context.Process(target=_work, args=arguments, daemon=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid or 0

    @property
    def pids(self) -> dict[str, int]:
        """Its own process id by its name while it runs, in the form of Host and Supervisor."""
        return {self.name: self.pid} if self._process.is_alive() else {}

    def start(self, *, wait: bool = True) -> "WorkerProcess":
        """Fork it; come back when it consumes, or at once.

        Raises:
            TimeoutError: it ended before it was ready.
        """
        self._process.start()
        self._stdin.close()
        self._ready_writer.close()
        if wait and not (self._ready.poll(READY_S) and _byte(self._ready)):
            raise TimeoutError(f"worker {self.name} is not ready")
        return self

    def kill(self) -> None:
        """SIGKILL; its leases expire, unless the test releases them."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def join(self) -> None:
        """Come back when it has ended."""
        self._process.join()
        self._alive.close()
        self._ready.close()

    def stop(self) -> None:
        """Drain it, as SIGTERM does."""
        if self.pid and self._process.is_alive():
            self._process.terminate()
        self.join()


def _byte(ready: Connection) -> bytes:
    return os.read(ready.fileno(), 1)  # one byte, as a supervisor gets it; nothing when the process has ended


def _work(spec: str, name: str, stdin: Connection, ready: Connection, env: dict[str, str]) -> None:
    """The worker as the command line starts it; its stdin closes when the process that made it ends."""
    os.environ.update(env)
    os.dup2(stdin.fileno(), 0)
    worker = importlib.import_module(WORKER)
    sys.exit(worker.main(json.loads(spec), name=name, ready_fd=os.dup(ready.fileno())))
