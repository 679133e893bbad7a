"""Publishes what the journal's scripts could not push themselves: for brokers that are not the journal's server."""

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

MAX_WAITING = 10_000  # about 12 MB; what comes beyond is left to the outbox
RECONNECT_S = 0.1  # a broker that failed is tried again after this, doubled up to MAX_RECONNECT_S
MAX_RECONNECT_S = 2.0
CLOSE_TIMEOUT_S = 3.0

_PUBLISHERS: WeakKeyDictionary[Celery, "Publisher"] = WeakKeyDictionary()
_LOCK = threading.Lock()


def publisher_for(app: Celery) -> "Publisher":
    """The app's publisher in this process, with the one connection that all its journals send over."""
    with _LOCK:
        if app not in _PUBLISHERS:
            _PUBLISHERS[app] = Publisher(app)
        return _PUBLISHERS[app]


class Publisher:
    """Sends what celery/dispatch.py rendered from a thread, in order. What is lost on the way is the outbox's to send again.

    It never holds up who calls it. While the broker is away up to 10,000 messages wait and go out when it is back; what
    comes beyond them is dropped, and sent again by a sweep: a second after it was due, then after 2, 4, … 64 s.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._sender: PublisherThread | None = None

    def __call__(self, sent: OutboxMessage) -> None:
        """Send soon."""
        sender = self._sender
        if sender is None or sender.pid != os.getpid():  # a fork has neither our threads nor our sockets
            with self._lock:
                sender = self._sender
                if sender is None or sender.pid != os.getpid():
                    sender = self._sender = PublisherThread(self._app)
                    sender.start()
        sender.put(sent)

    def close(self) -> None:
        """Send what waits, for up to 3 s, and give back the connection; the next message makes another."""
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
        self._bell = Waker()
        self._over = threading.Event()
        self._give_up = 0.0  # once it is over: until then what waits may go out
        self._dropped = 0

    def put(self, sent: OutboxMessage) -> None:
        """Send soon, or drop it when too much waits already."""
        if len(self._waiting) >= MAX_WAITING:
            self._dropped += 1
            return
        self._waiting.append(sent)
        self._bell.ring()

    def end(self) -> None:
        """Send what waits, for up to 3 s."""
        self._give_up = monotonic() + CLOSE_TIMEOUT_S
        self._over.set()
        self._bell.ring()
        self.join(timeout=CLOSE_TIMEOUT_S + 1)

    def run(self) -> None:
        """Serve one link after another."""
        try:
            self._send_all()
        finally:
            self._bell.close()

    def _send_all(self) -> None:
        again_s, away = RECONNECT_S, False
        while not self._over.is_set() or monotonic() < self._give_up:
            link: PublishConnection = (
                ConfirmedConnection(self._app, self._bell)
                if on_rabbit(self._app)
                else PlainConnection(self._app, self._bell)
            )
            try:
                link.open()
                if away:
                    log.warning(
                        "the broker accepts messages again; %d that did not fit in the buffer are re-sent by sweeps",
                        self._dropped,
                    )
                again_s, away, self._dropped = RECONNECT_S, False, 0
                self._serve(link)
                return
            except CONNECTION_ERRORS as error:
                self._waiting.extendleft(reversed(link.unconfirmed()))
                if not away:
                    log.warning("the broker accepts no messages (%r); retrying", error)
                away = True
                if self._over.wait(again_s):
                    sleep(RECONNECT_S)
                again_s = min(2 * again_s, MAX_RECONNECT_S)
            finally:
                link.close()

    def _serve(self, link: PublishConnection) -> None:
        while True:
            while self._waiting and link.room:
                link.send(self._waiting[0])
                self._waiting.popleft()  # only now: one whose sending raised is tried again
            over = self._over.is_set()
            if over and (monotonic() > self._give_up or not (self._waiting or link.unconfirmed())):
                return
            link.listen(0.1 if over else link.PATIENCE_S)
