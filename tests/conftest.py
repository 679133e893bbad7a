"""For every test: what the processes that it starts need. And for those that want it: waiting, the command line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis


@pytest.fixture(scope="session", autouse=True)
def _compiled_once() -> None:
    """Where nothing compiled may be kept, each of some hundred processes would compile all of agentmesh anew."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session", autouse=True)
def _heard_interrupts() -> Iterator[None]:
    """A suite that was started in the background of a shell has SIGINT ignored, and so have all that it starts."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """`eventually(condition)` comes back when it is true, and fails after `timeout_s` (15). A store that is down is asked again."""

    def wait(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
        __tracebackhide__ = True  # a failure is shown at the line that waits, with its condition
        deadline = time.monotonic() + timeout_s
        while True:
            began = time.monotonic()
            try:
                last = condition()
            except redis.RedisError as e:
                last, true = e, False
            else:
                true = bool(last)
            if true:
                return
            if (now := time.monotonic()) > deadline:
                pytest.fail(f"not within {timeout_s} s; the condition was {last!r} at last")
            time.sleep(max(0.005, 2 * (now - began)))  # what is waited for shall have the processor

    return wait


class Shell:
    """`shell("runs", "ls", code=0)` runs a command in the test's folder and answers what it prints; `err` is the rest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.err = folder, ""
        self.env = {**os.environ, "AGENTMESH_LEASE_S": "3"}

    def argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "agentmesh.cli.main", *args]

    def __call__(self, *args: str, code: int = 0) -> str:
        done = subprocess.run(
            self.argv(*args), cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        self.err = done.stderr
        return done.stdout

    def start(self, *args: str) -> "subprocess.Popen[str]":
        """The command in a process group of its own, so that a test can interrupt or kill it."""
        return subprocess.Popen(
            self.argv(*args), cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            process_group=0,
        )  # fmt: skip


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """The command line as a user has it, with an embedded Valkey in the test's folder."""
    return Shell(tmp_path)
