"""The loop of a worker's thread that consumes from RabbitMQ: with heartbeats, and no message un-acked for long."""

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from celery.bootsteps import RUN

from agentmesh.celery.lanes import Lanes
from agentmesh.celery.rabbitmq import Waker, drain_events

WAIT_S = 0.1
TICK_S = 1.0
MAX_UNACKED_S = 45.0  # RabbitMQ closes a channel with a message un-acked for half an hour, or its `consumer_timeout`


class UnackedMessages:
    """The messages of a worker that are not acked. Used on the consumer's thread, except `acknowledge`.

    A message is acked when its step has ended, so that RabbitMQ gives a worker no more than it has room for. A step is
    kept by the journal's lease, not by its message: so after 45 s a message is acked in any case.
    """

    prefetch = 0  # how many messages RabbitMQ may send ahead of their acks; 0 is the worker's concurrency

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.waker = Waker()
        self._unacked: dict[int, tuple[float, Any]] = {}
        self._waiting: deque[Any] = deque()  # those the pool had no room for: after a reconnect, or an early ack
        self._ticked = 0.0
        self._closing = False

    def begin(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """Start on a new connection, with no messages; returns the callback for each message."""
        self._closing = False
        self._unacked.clear()
        self._waiting.clear()
        self._handle = handle
        self._wake_at = max(1, self._consumer.initial_prefetch_count // 4)

        return self.received

    def received(self, message: Any) -> None:
        """Start a message's step, or let it wait for room."""
        self._unacked[message.delivery_tag] = monotonic(), message
        if self._closing or self._waiting or self._consumer.pool.full:
            self._waiting.append(message)
        else:
            self._handle(message)

    def acknowledge(self, act: Any, args: Any, kwargs: Any) -> Any:
        """Send a message's ack or reject, from any thread: it goes out with the thread's next turn."""
        pending = self._consumer._pending_operations
        pending.append(partial(self._acknowledge, act, args, kwargs))
        if len(pending) >= self._wake_at:  # fewer wait for the next message, or a tenth of a second
            self.waker.wake()
        return act

    def _acknowledge(self, act: Any, args: Any, kwargs: Any) -> None:
        message = act.__self__
        if self._unacked.get(message.delivery_tag, (0.0, None))[1] is not message:
            return  # acked already, or of a lost connection: RabbitMQ has it again
        del self._unacked[message.delivery_tag]
        act(*args, **kwargs)

    def tick(self) -> None:
        """Do what is due between two reads: acks, waiting messages, heartbeats, acks of old messages."""
        self._consumer.perform_pending_operations()
        self.start_waiting()
        now = monotonic()
        if now - self._ticked < TICK_S:
            return
        self._ticked = now
        self._consumer.connection.heartbeat_check()
        for tag, (since, message) in list(self._unacked.items()):
            if now - since < MAX_UNACKED_S:
                break
            with contextlib.suppress(ValueError):
                self._waiting.remove(message)  # its step was not begun: the outbox re-sends it
            del self._unacked[tag]
            message.ack()

    def start_waiting(self) -> None:
        """Start the steps of waiting messages, as far as the pool has room."""
        while self._waiting and not self._consumer.pool.full:
            self._handle(self._waiting.popleft())

    def stop(self, consumer: Any) -> None:
        """Consume no more: the pool drains now, and each ack would bring a message."""
        self._closing = True
        with contextlib.suppress(Exception):  # the broker does not respond
            for tag in consumer._active_tags.values():
                consumer.channel.basic_cancel(tag, nowait=True)  # its reply could take long
            self._requeue_waiting()

    def _requeue_waiting(self) -> None:
        """Return what was not begun to RabbitMQ."""
        while self._waiting:
            message = self._waiting.popleft()
            del self._unacked[message.delivery_tag]
            message.requeue()

    def keep_alive(self) -> None:
        """Send acks and heartbeats while the pool drains."""
        with contextlib.suppress(
            Exception
        ):  # the broker does not respond: un-acked messages are redelivered, and their claims refused
            drain_events(self._consumer.connection)
            self._requeue_waiting()  # what came after we stopped consuming
            self.tick()


def rabbitmq_loop(obj: Any, connection: Any, consumer: Any, blueprint: Any, *_: Any, **__: Any) -> None:
    """Consume until the blueprint leaves RUN."""
    unacked: UnackedMessages = obj.unacked
    consumer.on_message = unacked.begin(obj.create_task_handler())
    consumer.consume()
    obj.on_ready()
    with unacked.waker.waiter(connection.connection.sock) as waiter:
        while blueprint.state == RUN and obj.connection:
            try:
                more = drain_events(connection)
                unacked.tick()
                if not more:
                    waiter.wait(WAIT_S)
            except OSError:
                if blueprint.state == RUN:
                    raise
    unacked.stop(consumer)


# ---- With a limit of room, the most urgent lane first -------------------------------------------


class AdmissionQueue(UnackedMessages):
    """Starts steps only as far as `admits` has room. A message that waits longer than 45 s is acked, and the outbox re-sends it.

    Args:
        admits: how many more steps there is room for, given how many are in flight; Lanes also set their order.
    """

    prefetch = 1  # of each queue: quorum queues have no other count

    def __init__(self, consumer: Any, admits: Callable[[int], int]) -> None:
        super().__init__(consumer)
        self._lanes = admits if isinstance(admits, Lanes) else Lanes({}, admits)
        # the messages whose steps run, also those of an earlier connection, and their queues
        self._in_flight: dict[Any, str] = {}

    def received(self, message: Any) -> None:
        """Let a message wait for the thread's next turn."""
        self._unacked[message.delivery_tag] = monotonic(), message
        self._waiting.append(message)

    def start_waiting(self) -> None:
        """Start as many steps as there is room for."""
        while self._waiting and (message := self._next()) is not None:
            self._waiting.remove(message)
            del self._unacked[message.delivery_tag]
            self._handle(message)
            if not message.acknowledged:  # else it was not a step of ours, and was rejected
                self._in_flight[message] = message.delivery_info["routing_key"]
                message.ack()

    def _next(self) -> Any:
        in_flight = len(self._in_flight)
        room = min(self._lanes(in_flight), self._consumer.pool.limit - in_flight)
        if room <= 0:
            return None
        first: dict[str, Any] = {}
        for message in self._waiting:
            first.setdefault(message.delivery_info["routing_key"], message)
        urgent = sum(map(self._lanes.is_urgent, self._in_flight.values()))
        queues, _, _ = self._lanes.order(list(first), room, 0.0, urgent)
        return first[queues[0]] if queues else None

    def acknowledge(self, act: Any, args: Any, kwargs: Any) -> Any:
        """A step has ended: make room at once; from any thread."""
        self._consumer._pending_operations.append(lambda: self._ended(act, args, kwargs))
        self.waker.wake()
        return act

    def _ended(self, act: Any, args: Any, kwargs: Any) -> None:
        if self._in_flight.pop(act.__self__, None) is None:
            self._acknowledge(act, args, kwargs)
