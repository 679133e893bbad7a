"""The loop of a worker's thread that consumes from RabbitMQ: prompt, alive by heartbeats, and never long un-acked."""

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from celery.bootsteps import RUN

from agentmesh.celery.rabbit import Bell, take_all

POLL_S = 0.1
TICK_S = 1.0
ACK_S = 45.0  # RabbitMQ closes the channel of whoever keeps a message un-acked for half an hour, or what its owner set


class Unacked:
    """The messages a worker has and RabbitMQ still counts as its own. Used on the consumer's thread, but for `settle`.

    A message is acked when its step has ended, so that RabbitMQ gives a worker no more than it has room for. It is not
    what keeps a step alive: that is the journal's lease. So after 45 s it is acked in any case.
    """

    prefetch = 0  # how many messages RabbitMQ may send ahead of their acks; 0 is the worker's concurrency

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.bell = Bell()
        self._held: dict[int, tuple[float, Any]] = {}
        self._parked: deque[Any] = deque()  # more than the pool has room for: after a reconnect, or an early ack
        self._ticked = 0.0

    def begin(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """On a new connection nothing is held; answers what takes each message."""
        self._held.clear()
        self._parked.clear()
        self._handle = handle
        self._ring_at = max(1, self._consumer.initial_prefetch_count // 4)

        return self.received

    def received(self, message: Any) -> None:
        """Hand a message on, or park it."""
        self._held[message.delivery_tag] = monotonic(), message
        if self._parked or self._consumer.pool.full:
            self._parked.append(message)
        else:
            self._handle(message)

    def settle(self, act: Any, args: Any, kwargs: Any) -> Any:
        """A message's ack or reject, from any thread: it goes out with the thread's next turn."""
        waiting = self._consumer._pending_operations
        waiting.append(partial(self._settle, act, args, kwargs))
        if len(waiting) >= self._ring_at:  # below that they may wait for the next message, or a tenth of a second
            self.bell.ring()
        return act

    def _settle(self, act: Any, args: Any, kwargs: Any) -> None:
        message = act.__self__
        if self._held.get(message.delivery_tag, (0.0, None))[1] is not message:
            return  # acked already, or of a connection that is gone: RabbitMQ has it again
        del self._held[message.delivery_tag]
        act(*args, **kwargs)

    def turn(self) -> None:
        """What is due between two looks at the broker."""
        self._consumer.perform_pending_operations()
        self.hand_on()
        now = monotonic()
        if now - self._ticked < TICK_S:
            return
        self._ticked = now
        self._consumer.connection.heartbeat_check()
        for tag, (since, message) in list(self._held.items()):
            if now - since < ACK_S:
                break
            with contextlib.suppress(ValueError):
                self._parked.remove(message)  # nobody works on it: the outbox sends it again
            del self._held[tag]
            message.ack()

    def hand_on(self) -> None:
        """What was parked, as far as the pool has room."""
        while self._parked and not self._consumer.pool.full:
            self._handle(self._parked.popleft())

    def keep_alive(self) -> None:
        """While the pool drains: acks and heartbeats, and no new messages."""
        with contextlib.suppress(Exception):  # the broker is away: what is not acked comes again, and is refused
            self._parked.clear()
            take_all(self._consumer.connection)
            self.turn()


def rabbit_loop(obj: Any, connection: Any, consumer: Any, blueprint: Any, *_: Any, **__: Any) -> None:
    """Consume until the blueprint leaves RUN."""
    unacked: Unacked = obj.unacked
    consumer.on_message = unacked.begin(obj.create_task_handler())
    consumer.consume()
    obj.on_ready()
    with unacked.bell.beside(connection.connection.sock) as waiter:
        while blueprint.state == RUN and obj.connection:
            try:
                more = take_all(connection)
                unacked.turn()
                if not more:
                    waiter.wait(POLL_S)
            except OSError:
                if blueprint.state == RUN:
                    raise
