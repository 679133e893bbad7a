"""What a worker process owes the supervisor that started it: a byte when it consumes, and its leave when that is gone."""

import contextlib
import os
import signal
import threading
import time

LEFT_BY_FORCE = 1


def announce_ready(fd: int) -> None:
    """Tell the supervisor that this worker consumes."""
    with contextlib.suppress(OSError):
        os.write(fd, b"1")
        os.close(fd)


def leave_with_parent(grace_s: float) -> None:
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
    os._exit(LEFT_BY_FORCE)
