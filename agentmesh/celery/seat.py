"""One place for a worker under a supervisor: the process in it changes, its command does not. Loads no Celery."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

AGAIN_S = 0.05  # a dead worker is started again after this, doubled up to AGAIN_MOST_S while none gets ready
AGAIN_MOST_S = 5.0
AGAIN_KNOWN_S = 0.5  # the most for a command that has worked: it ends because a server is away, or somebody kills it


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a worker.

    Args:
        argv: the interpreter first. Every user of the machine can read it.
        env: added to its environment: the place for what only the worker may know.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class Spare(Protocol):
    """A worker that is there only while something waits for it; it leaves with code 0 when nothing does."""

    command: Command

    def wanted(self) -> bool:
        """Whether something waits for it; asked on a thread of the supervisor's, and may take its time."""
        ...

    def close(self) -> None:
        """Give back what it looks with; on that thread too."""
        ...


class Seat:
    """A worker's place. Times are in monotonic seconds."""

    def __init__(self, command: Command, spare: Spare | None = None) -> None:
        self.command, self.spare = command, spare
        self.process: subprocess.Popen[bytes] | None = None
        self.name = ""
        self.due = math.inf if spare else 0.0  # when to start it
        self.again_s = AGAIN_S
        self.not_before = 0.0
        self.ready = False  # the process that runs now
        self.ever_ready = False

    def start(self, output: "int | IO[Any] | None", env: Mapping[str, str]) -> int:
        """Start a process here; the end of the pipe on which it says that it is ready."""
        self.name = f"{socket.gethostname()}:{os.getpid()}/{uuid.uuid4().hex[:8]}{'-spare' if self.spare else ''}"
        told, ready = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*self.command.argv, "--worker-name", self.name, "--ready-fd", str(ready)],
                stdin=subprocess.PIPE,  # never written to: it breaks when this process ends, and the worker leaves
                stdout=output, stderr=output, pass_fds=(ready,), env={**env, **self.command.env},
                process_group=0,  # a Ctrl-C of the terminal is for the supervisor alone
            )  # fmt: skip
        except BaseException:
            os.close(told)
            raise
        finally:
            os.close(ready)
        return told

    def empty(self, now: float) -> None:
        """Its process has ended: a worker is started again, a spare one when it is wanted."""
        if self.ready:  # it came up: whatever ended it is no crash loop, and a step that kills is the journal's to hold
            self.again_s = AGAIN_S
        self.process, self.ready = None, False
        self.not_before = now + self.again_s
        self.due = math.inf if self.spare else self.not_before

    def want(self) -> None:
        """Start the spare worker, unless it runs."""
        if self.process is None:
            self.due = self.not_before

    def back_off(self) -> None:
        """For the case that the next process does not get ready."""
        self.again_s = min(2 * self.again_s, AGAIN_KNOWN_S if self.ever_ready else AGAIN_MOST_S)


def kill_group(pid: int) -> None:
    """SIGKILL to a worker and what it forked."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
