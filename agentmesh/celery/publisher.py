"""Sends messages to a broker that is not the journal's server; on one server the journal's scripts send them.

The messages are rendered in celery/dispatch.py. The journal hands them over after the script that wrote them; where
broker and journal are one server and database, `send` in journal/lua/common.lua pushes them in the same act.
"""

import logging
import os
import threading
from collections import deque
from time import monotonic, sleep
from weakref import WeakKeyDictionary

from celery import Celery

from agentmesh.celery.publish_connection import (
    CONNECTION_ERRORS,
    ConfirmedConnection,
    PlainConnection,
    PublishConnection,
)
from agentmesh.celery.rabbitmq import Waker, on_rabbit
from agentmesh.journal.types import OutboxMessage

log = logging.getLogger("agentmesh")

MAX_WAITING = 10_000  # about 12 MB; more is left to the journal's outbox
RECONNECT_S = 0.1  # a broker that failed is retried after this, doubled up to MAX_RECONNECT_S
MAX_RECONNECT_S = 2.0
CLOSE_TIMEOUT_S = 3.0
DRAIN_LISTEN_S = 0.1  # between two checks for the end of a drain

_PUBLISHERS: WeakKeyDictionary[Celery, "Publisher"] = WeakKeyDictionary()
_LOCK = threading.Lock()


def publisher_for(app: Celery) -> "Publisher":
    """The app's publisher in this process, with one connection for all journals of the app."""
    with _LOCK:
        if app not in _PUBLISHERS:
            _PUBLISHERS[app] = Publisher(app)
        return _PUBLISHERS[app]


class Publisher:
    """Sends what celery/dispatch.py rendered from a thread, in order. The sweep of the journal's outbox re-sends what is lost.

    It never blocks the caller. While the broker does not respond up to 10,000 messages wait and go out when it is back;
    more are dropped, and re-sent by a sweep: a second after they were due, then after 2, 4, … 64 s.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._sender: PublisherThread | None = None

    def __call__(self, message: OutboxMessage) -> None:
        """Send soon."""
        sender = self._sender
        if sender is None or sender.pid != os.getpid():  # a fork has neither our threads nor our sockets
            with self._lock:
                sender = self._sender
                if sender is None or sender.pid != os.getpid():
                    sender = self._sender = PublisherThread(self._app)
                    sender.start()
        sender.put(message)

    def close(self) -> None:
        """Send what waits, for up to 3 s, and close the connection; the next message makes another."""
        with self._lock:
            sender, self._sender = self._sender, None
        if sender is not None and sender.pid == os.getpid():
            sender.end()


class PublisherThread(threading.Thread):
    """The thread of a publisher, from its first message to its close."""

    def __init__(self, app: Celery) -> None:
        super().__init__(name="agentmesh-publisher", daemon=True)
        self.pid = os.getpid()
        self._app = app
        self._waiting: deque[OutboxMessage] = deque()
        self._waker = Waker()
        self._stopped = threading.Event()
        self._drain_ends = 0.0  # once stopped: until then waiting messages are sent
        self._dropped = 0

    def put(self, message: OutboxMessage) -> None:
        """Send soon, or drop it when too many wait already."""
        if len(self._waiting) >= MAX_WAITING:
            self._dropped += 1
            return
        self._waiting.append(message)
        self._waker.wake()

    def end(self) -> None:
        """Send what waits, for up to 3 s."""
        self._drain_ends = monotonic() + CLOSE_TIMEOUT_S
        self._stopped.set()
        self._waker.wake()
        self.join(timeout=CLOSE_TIMEOUT_S + 1)

    def run(self) -> None:
        """Send over one connection after another."""
        try:
            self._send_all()
        finally:
            self._waker.close()

    def _send_all(self) -> None:
        reconnect_s, unreachable = RECONNECT_S, False
        while not self._stopped.is_set() or monotonic() < self._drain_ends:
            connection: PublishConnection = (
                ConfirmedConnection(self._app, self._waker)
                if on_rabbit(self._app)
                else PlainConnection(self._app, self._waker)
            )
            try:
                connection.open()
                if unreachable:
                    log.warning(
                        "the broker accepts messages again; %d that did not fit in the buffer are re-sent by sweeps",
                        self._dropped,
                    )
                reconnect_s, unreachable, self._dropped = RECONNECT_S, False, 0
                self._serve(connection)
                return
            except CONNECTION_ERRORS as error:
                self._waiting.extendleft(reversed(connection.unconfirmed()))
                if not unreachable:
                    log.warning("the broker accepts no messages (%r); retrying", error)
                unreachable = True
                if self._stopped.wait(reconnect_s):
                    sleep(RECONNECT_S)
                reconnect_s = min(2 * reconnect_s, MAX_RECONNECT_S)
            finally:
                connection.close()

    def _serve(self, connection: PublishConnection) -> None:
        while True:
            while self._waiting and connection.room:
                connection.send(self._waiting[0])
                self._waiting.popleft()  # only now: a message whose sending raised is retried
            stopped = self._stopped.is_set()
            if stopped and (monotonic() > self._drain_ends or not (self._waiting or connection.unconfirmed())):
                return
            connection.listen(DRAIN_LISTEN_S if stopped else connection.IDLE_LISTEN_S)
