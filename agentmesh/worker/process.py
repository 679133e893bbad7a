"""A worker process, from both ends: its slot under the supervisor, and what it reports to it. Loads no Celery."""

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

RESTART_S = 0.05  # a dead worker is restarted after this, doubled up to MAX_RESTART_S while none gets ready
MAX_RESTART_S = 5.0
# at most, for a command that was ready before: it ends because a server does not respond, or somebody kills it
MAX_RESTART_AFTER_READY_S = 0.5


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
    """A worker that runs only while something waits for it; it exits with code 0 when nothing does."""

    command: Command

    def is_needed(self) -> bool:
        """Whether something waits for it; called on a thread of the supervisor, and may block."""
        ...

    def close(self) -> None:
        """Close its connections; called on that thread too."""
        ...


class WorkerSlot:
    """The place of one worker under a supervisor. Times are in monotonic seconds."""

    def __init__(self, command: Command, standby: StandbyWorker | None = None) -> None:
        self.command, self.standby = command, standby
        self.process: subprocess.Popen[bytes] | None = None
        self.name = ""
        self.due = math.inf if standby else 0.0  # when to start it
        self.restart_s = RESTART_S
        self.not_before = 0.0
        self.ready = False  # the process that runs now
        self.ever_ready = False

    def start(self, output: "int | IO[Any] | None", env: Mapping[str, str]) -> int:
        """Start a process; returns the pipe on which it reports that it is ready."""
        self.name = f"{socket.gethostname()}:{os.getpid()}/{uuid.uuid4().hex[:8]}{'-standby' if self.standby else ''}"
        ready_read, ready = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*self.command.argv, "--worker-name", self.name, "--ready-fd", str(ready)],
                stdin=subprocess.PIPE,  # never written to: it breaks when this process ends, and the worker exits
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
        """Its process has ended: it is restarted, a standby worker when it is needed."""
        if self.ready:  # so this is not a crash loop; a step that kills its worker is the journal's to quarantine
            self.restart_s = RESTART_S
        self.process, self.ready = None, False
        self.not_before = now + self.restart_s
        self.due = math.inf if self.standby else self.not_before

    def request_start(self) -> None:
        """Start the standby worker, unless it runs."""
        if self.process is None:
            self.due = self.not_before

    def back_off(self) -> None:
        """Wait longer before the next restart, in case that process does not get ready either."""
        self.restart_s = min(2 * self.restart_s, MAX_RESTART_AFTER_READY_S if self.ever_ready else MAX_RESTART_S)


def kill_group(pid: int) -> None:
    """SIGKILL a worker and what it forked."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


# ---- In the worker process ----------------------------------------------------------------------

FORCED_EXIT_CODE = 1


def announce_ready(fd: int) -> None:
    """Tell the supervisor that this worker consumes."""
    with contextlib.suppress(OSError):
        os.write(fd, b"1")
        os.close(fd)


def exit_with_parent(grace_s: float) -> None:
    """Drain as on SIGTERM when the supervisor has ended, however it ended, and exit after `grace_s` at the latest."""
    threading.Thread(target=_watch_parent, args=(grace_s,), name="agentmesh-parent", daemon=True).start()


def _watch_parent(grace_s: float) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 64):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    if os.getpgrp() == os.getpid():  # a process group of our own: kill the processes of a prefork pool too
        os.killpg(0, signal.SIGKILL)
    os._exit(FORCED_EXIT_CODE)
