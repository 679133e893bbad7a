"""Somebody who takes messages out of a broker's queues beside the workers: some are lost, repeated, late, out of order."""

import heapq
import itertools
import random
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import kombu as _kombu

kombu: Any = _kombu  # untyped, and its names are loaded lazily

WAIT_S = 0.05


class DisturbMessages:
    """Consumes like one more worker and sends on what it took: later, so that others overtake it; twice; or not at all.

    Args:
        broker: the broker's URL, Redis or RabbitMQ.
        queues: names of its queues: `crew.queues.broker_names()`.
        loss, repeat: probabilities.
        late_s: how long a message is held at most.

    Attributes:
        taken, lost, repeated: how many messages.
    """

    def __init__(
        self, broker: str, queues: Sequence[str], *, seed: int = 0, loss: float = 0.1, repeat: float = 0.3,
        late_s: float = 0.3,
    ) -> None:  # fmt: skip
        self._broker, self._queues, self._rng = broker, list(queues), random.Random(seed)
        self._loss, self._repeat, self._late_s = loss, repeat, late_s
        self.taken = self.lost = self.repeated = 0
        self._held: list[tuple[float, int, Any]] = []
        self._order = itertools.count()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chaos-messages", daemon=True)

    def __enter__(self) -> "DisturbMessages":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(Exception):  # the broker may be away: what is held then is late, or lost, as is its right
                self._disturb()
            self._over.wait(0.1)

    def _disturb(self) -> None:
        redis = not self._broker.startswith(("amqp", "pyamqp"))
        options = {"ack_emulation": False} if redis else {}
        with kombu.Connection(self._broker, transport_options=options) as connection:
            queues = [kombu.Queue(name, no_declare=True) for name in self._queues]
            producer = kombu.Producer(connection.channel())
            with kombu.Consumer(connection.channel(), queues, no_ack=True, on_message=self._take, accept=["json"]):
                while not self._over.is_set():
                    with suppress(TimeoutError):
                        connection.drain_events(timeout=WAIT_S)
                    self._send(producer, time.monotonic())
            self._send(producer, float("inf"))

    def _take(self, message: Any) -> None:
        self.taken += 1
        if self._rng.random() < self._loss:
            self.lost += 1
            return
        again = self._rng.random() < self._repeat
        self.repeated += again
        for _ in range(1 + again):
            at = time.monotonic() + self._rng.uniform(0, self._late_s)
            heapq.heappush(self._held, (at, next(self._order), message))

    def _send(self, producer: Any, now: float) -> None:
        while self._held and self._held[0][0] <= now:
            _, _, message = heapq.heappop(self._held)
            producer.publish(
                message.body, exchange="", routing_key=message.delivery_info["routing_key"], headers=message.headers,
                content_type=message.content_type, content_encoding=message.content_encoding, delivery_mode=2,
                correlation_id=message.properties.get("correlation_id"),
            )  # fmt: skip
