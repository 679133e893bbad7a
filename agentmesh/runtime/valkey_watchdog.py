"""Keeps a Valkey server running while any process holds a lock; a script that `valkey.py` starts, standard library only.

`python -I -S valkey_watchdog.py SPEC`, SPEC being JSON: folder, argv of the server.
"""

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from typing import Any

RESTART_S = 0.05  # a dead server is started again after this, doubled up to MAX_RESTART_S
MAX_RESTART_S = 2.0
STABLE_S = 10.0  # a server that ran this long resets the back-off


def main(spec: dict[str, Any]) -> None:
    """Keep the server until the last user has released its lock, or has died."""
    os.chdir(spec["folder"])
    alone = os.open("keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    server = WatchedServer(spec["argv"])

    def leave(*_: object) -> None:
        server.end()
        # Before `users`: the next process to join looks for a watchdog, and at an exit the kernel chooses the order.
        os.close(alone)
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=server.keep, daemon=True).start()
    users = os.open("users.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(users, fcntl.LOCK_EX)  # returns when the last user is gone
    leave()


class WatchedServer:
    """The server process, started again whenever it dies."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self._closing = False
        self._pid = 0

    def keep(self) -> None:
        """Run it, and restart it whenever it ends."""
        restart_s = RESTART_S
        while not self._closing:
            began = time.monotonic()
            self._pid = os.posix_spawn(self._argv[0], self._argv, os.environ)
            if self._closing:  # asked to leave while it started
                os.kill(self._pid, signal.SIGTERM)
            os.waitpid(self._pid, 0)
            self._pid = 0
            if self._closing:
                break
            restart_s = RESTART_S if time.monotonic() - began > STABLE_S else min(2 * restart_s, MAX_RESTART_S)
            time.sleep(restart_s)

    def end(self) -> None:
        """Stop the server, which flushes its file first."""
        self._closing = True
        while pid := self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.005)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
