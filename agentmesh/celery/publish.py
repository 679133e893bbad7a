"""Publishes what the journal's scripts could not push themselves: for brokers that are not the journal's server."""

import json
import logging
import queue
import threading
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from agentmesh.ports import Sent

log = logging.getLogger("agentmesh")


class Publisher:
    """Sends rendered messages from a thread of its own, in order; a lost one is the outbox's to send again."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._waiting: queue.SimpleQueue[Sent | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __call__(self, sent: Sent) -> None:
        """Send soon."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="agentmesh-publisher", daemon=True)
                self._thread.start()
        self._waiting.put(sent)

    def close(self) -> None:
        """Send what is left and end."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._waiting.put(None)
            thread.join(timeout=5)

    def _run(self) -> None:
        with self._app.producer_pool.acquire(block=True) as producer:
            while (sent := self._waiting.get()) is not None:
                try:
                    publish(producer, sent)
                except (OperationalError, OSError) as e:
                    log.warning("a message for %s was not published (%s); the sweeper sends it again", sent.queue, e)


def publish(producer: Any, sent: Sent) -> None:
    """One rendered message, through kombu."""
    message = json.loads(sent.body)
    properties = message["properties"]
    producer.publish(
        message["body"],
        exchange="",
        routing_key=sent.queue,
        headers=message["headers"],
        content_type=message["content-type"],
        content_encoding=message["content-encoding"],
        correlation_id=properties["correlation_id"],
        delivery_mode=2,
        retry=True,
        retry_policy={"max_retries": 3, "interval_start": 0.1},
    )
