"""A worker process from both ends: its slot under the supervisor, and what it owes the supervisor that started it. Loads no Celery."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

RESTART_S = 0.05  # a dead worker is started again after this, doubled up to MAX_RESTART_S while none gets ready
MAX_RESTART_S = 5.0
STANDBY_RESTART_S = (
    0.5  # the most for a command that has worked: it ends because a server is away, or somebody kills it
)


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a worker.

    Args:
        argv: the interpreter first. Every user of the machine can read it.
        env: added to its environment: the place for what only the worker may know.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class StandbyWorker(Protocol):
    """A worker that is there only while something waits for it; it leaves with code 0 when nothing does."""

    command: Command

    def is_needed(self) -> bool:
        """Whether something waits for it; asked on a thread of the supervisor's, and may take its time."""
        ...

    def close(self) -> None:
        """Give back what it looks with; on that thread too."""
        ...


class WorkerSlot:
    """A worker's place. Times are in monotonic seconds."""

    def __init__(self, command: Command, spare: StandbyWorker | None = None) -> None:
        self.command, self.spare = command, spare
        self.process: subprocess.Popen[bytes] | None = None
        self.name = ""
        self.due = math.inf if spare else 0.0  # when to start it
        self.again_s = RESTART_S
        self.not_before = 0.0
        self.ready = False  # the process that runs now
        self.ever_ready = False

    def start(self, output: "int | IO[Any] | None", env: Mapping[str, str]) -> int:
        """Start a process here; the end of the pipe on which it says that it is ready."""
        self.name = f"{socket.gethostname()}:{os.getpid()}/{uuid.uuid4().hex[:8]}{'-spare' if self.spare else ''}"
        ready_read, ready = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*self.command.argv, "--worker-name", self.name, "--ready-fd", str(ready)],
                stdin=subprocess.PIPE,  # never written to: it breaks when this process ends, and the worker leaves
                stdout=output, stderr=output, pass_fds=(ready,), env={**env, **self.command.env},
                process_group=0,  # a Ctrl-C of the terminal is for the supervisor alone
            )  # fmt: skip
        except BaseException:
            os.close(ready_read)
            raise
        finally:
            os.close(ready)
        return ready_read

    def on_exit(self, now: float) -> None:
        """Its process has ended: a worker is started again, a spare one when it is wanted."""
        if self.ready:  # it came up: whatever ended it is no crash loop, and a step that kills is the journal's to hold
            self.again_s = RESTART_S
        self.process, self.ready = None, False
        self.not_before = now + self.again_s
        self.due = math.inf if self.spare else self.not_before

    def request_start(self) -> None:
        """Start the spare worker, unless it runs."""
        if self.process is None:
            self.due = self.not_before

    def back_off(self) -> None:
        """For the case that the next process does not get ready."""
        self.again_s = min(2 * self.again_s, STANDBY_RESTART_S if self.ever_ready else MAX_RESTART_S)


def kill_group(pid: int) -> None:
    """SIGKILL to a worker and what it forked."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


# ---- What a worker process owes the supervisor that started it ----------------------------------

FORCED_EXIT_CODE = 1


def announce_ready(fd: int) -> None:
    """Tell the supervisor that this worker consumes."""
    with contextlib.suppress(OSError):
        os.write(fd, b"1")
        os.close(fd)


def exit_with_parent(grace_s: float) -> None:
    """Drain as on SIGTERM when the supervisor is gone, however it went, and exit after `grace_s` at the latest."""
    threading.Thread(target=_watch_parent, args=(grace_s,), name="agentmesh-parent", daemon=True).start()


def _watch_parent(grace_s: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 64):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    if os.getpgrp() == os.getpid():  # a group of our own: take the processes of a prefork pool along
        os.killpg(0, signal.SIGKILL)
    os._exit(FORCED_EXIT_CODE)
