"""Keeps a Valkey server alive while anyone holds a lock; run as a script by `valkey.py`, standard library only.

`python -I -S keeper.py SPEC`, SPEC being JSON: folder, argv of the server.
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
STABLE_S = 10.0  # a server that lived this long starts the back-off anew


def main(spec: dict[str, Any]) -> None:
    """Serve until the last user is gone, however it went."""
    os.chdir(spec["folder"])
    alone = os.open("keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    server = Server(spec["argv"])

    def leave(*_: object) -> None:
        server.end()
        os.close(
            alone
        )  # before `users`: who then joins looks for a keeper, and at an exit the kernel chooses the order
        os._exit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=server.keep, daemon=True).start()
    users = os.open("users.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(users, fcntl.LOCK_EX)  # comes back when the last user is gone
    leave()


class Server:
    """The server process, started again whenever it dies."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self._closing = False
        self._pid = 0

    def keep(self) -> None:
        """Run it, again and again."""
        again_s = RESTART_S
        while not self._closing:
            began = time.monotonic()
            self._pid = os.posix_spawn(self._argv[0], self._argv, os.environ)
            if self._closing:  # asked to leave while it started
                os.kill(self._pid, signal.SIGTERM)
            os.waitpid(self._pid, 0)
            self._pid = 0
            if self._closing:
                break
            again_s = RESTART_S if time.monotonic() - began > STABLE_S else min(2 * again_s, MAX_RESTART_S)
            time.sleep(again_s)

    def end(self) -> None:
        """End the server, which writes what it still has to."""
        self._closing = True
        while pid := self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.005)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
