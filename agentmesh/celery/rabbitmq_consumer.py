"""The loop of a worker's thread that consumes from RabbitMQ: prompt, alive by heartbeats, and never long un-acked."""

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from celery.bootsteps import RUN

from agentmesh.celery.lanes import Lanes
from agentmesh.celery.rabbitmq import Waker, drain_events

POLL_S = 0.1
TICK_S = 1.0
MAX_UNACKED_S = (
    45.0  # RabbitMQ closes the channel of whoever keeps a message un-acked for half an hour, or what its owner set
)


class UnackedMessages:
    """The messages a worker has and RabbitMQ still counts as its own. Used on the consumer's thread, but for `settle`.

    A message is acked when its step has ended, so that RabbitMQ gives a worker no more than it has room for. It is not
    what keeps a step alive: that is the journal's lease. So after 45 s it is acked in any case.
    """

    prefetch = 0  # how many messages RabbitMQ may send ahead of their acks; 0 is the worker's concurrency

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.bell = Waker()
        self._held: dict[int, tuple[float, Any]] = {}
        self._parked: deque[Any] = deque()  # more than the pool has room for: after a reconnect, or an early ack
        self._ticked = 0.0
        self._leaving = False

    def begin(self, handle: Callable[[Any], None]) -> Callable[[Any], None]:
        """On a new connection nothing is held; answers what takes each message."""
        self._leaving = False
        self._held.clear()
        self._parked.clear()
        self._handle = handle
        self._ring_at = max(1, self._consumer.initial_prefetch_count // 4)

        return self.received

    def received(self, message: Any) -> None:
        """Hand a message on, or park it."""
        self._held[message.delivery_tag] = monotonic(), message
        if self._leaving or self._parked or self._consumer.pool.full:
            self._parked.append(message)
        else:
            self._handle(message)

    def acknowledge(self, act: Any, args: Any, kwargs: Any) -> Any:
        """A message's ack or reject, from any thread: it goes out with the thread's next turn."""
        waiting = self._consumer._pending_operations
        waiting.append(partial(self._acknowledge, act, args, kwargs))
        if len(waiting) >= self._ring_at:  # below that they may wait for the next message, or a tenth of a second
            self.bell.ring()
        return act

    def _acknowledge(self, act: Any, args: Any, kwargs: Any) -> None:
        message = act.__self__
        if self._held.get(message.delivery_tag, (0.0, None))[1] is not message:
            return  # acked already, or of a connection that is gone: RabbitMQ has it again
        del self._held[message.delivery_tag]
        act(*args, **kwargs)

    def tick(self) -> None:
        """What is due between two looks at the broker."""
        self._consumer.perform_pending_operations()
        self.hand_over()
        now = monotonic()
        if now - self._ticked < TICK_S:
            return
        self._ticked = now
        self._consumer.connection.heartbeat_check()
        for tag, (since, message) in list(self._held.items()):
            if now - since < MAX_UNACKED_S:
                break
            with contextlib.suppress(ValueError):
                self._parked.remove(message)  # nobody works on it: the outbox sends it again
            del self._held[tag]
            message.ack()

    def hand_over(self) -> None:
        """What was parked, as far as the pool has room."""
        while self._parked and not self._consumer.pool.full:
            self._handle(self._parked.popleft())

    def leave(self, consumer: Any) -> None:
        """Take nothing more: the pool drains now, and each ack would bring a message."""
        self._leaving = True
        with contextlib.suppress(Exception):  # the broker is away
            for tag in consumer._active_tags.values():
                consumer.channel.basic_cancel(tag, nowait=True)  # its answer could be long in coming
            self._give_back()

    def _give_back(self) -> None:
        """What was not begun."""
        while self._parked:
            message = self._parked.popleft()
            del self._held[message.delivery_tag]
            message.requeue()

    def keep_alive(self) -> None:
        """While the pool drains: acks and heartbeats."""
        with contextlib.suppress(Exception):  # the broker is away: what is not acked comes again, and is refused
            drain_events(self._consumer.connection)
            self._give_back()  # what was on its way when we left
            self.tick()


def rabbitmq_loop(obj: Any, connection: Any, consumer: Any, blueprint: Any, *_: Any, **__: Any) -> None:
    """Consume until the blueprint leaves RUN."""
    unacked: UnackedMessages = obj.unacked
    consumer.on_message = unacked.begin(obj.create_task_handler())
    consumer.consume()
    obj.on_ready()
    with unacked.bell.beside(connection.connection.sock) as waiter:
        while blueprint.state == RUN and obj.connection:
            try:
                more = drain_events(connection)
                unacked.tick()
                if not more:
                    waiter.wait(POLL_S)
            except OSError:
                if blueprint.state == RUN:
                    raise
    unacked.leave(consumer)


# ---- Consuming from RabbitMQ only what there is room for, the most urgent lane first ------------


class AdmissionQueue(UnackedMessages):
    """The messages that wait to be let in, and the steps that were. What waits longer than 45 s is the outbox's to send again.

    Args:
        admits: how many more there is room for, given how many are in hand; Lanes also say in what order.
    """

    prefetch = 1  # of each queue: quorum queues know no other count

    def __init__(self, consumer: Any, admits: Callable[[int], int]) -> None:
        super().__init__(consumer)
        self._lanes = admits if isinstance(admits, Lanes) else Lanes({}, admits)
        # messages whose steps go on, also those of an earlier connection; their queues
        self._in_hand: dict[Any, str] = {}

    def received(self, message: Any) -> None:
        """It waits for the thread's next turn."""
        self._held[message.delivery_tag] = monotonic(), message
        self._parked.append(message)

    def hand_over(self) -> None:
        """Let in what there is room for."""
        while self._parked and (message := self._next()) is not None:
            self._parked.remove(message)
            del self._held[message.delivery_tag]
            self._handle(message)
            if not message.acknowledged:  # else it was no step of ours, and was refused
                self._in_hand[message] = message.delivery_info["routing_key"]
                message.ack()

    def _next(self) -> Any:
        in_hand = len(self._in_hand)
        room = min(self._lanes(in_hand), self._consumer.pool.limit - in_hand)
        if room <= 0:
            return None
        first: dict[str, Any] = {}
        for message in self._parked:
            first.setdefault(message.delivery_info["routing_key"], message)
        urgent = sum(map(self._lanes.is_urgent, self._in_hand.values()))
        queues, _, _ = self._lanes.order(list(first), room, 0.0, urgent)
        return first[queues[0]] if queues else None

    def acknowledge(self, act: Any, args: Any, kwargs: Any) -> Any:
        """A step's end, from any thread: there is room at once."""
        self._consumer._pending_operations.append(lambda: self._ended(act, args, kwargs))
        self.bell.ring()
        return act

    def _ended(self, act: Any, args: Any, kwargs: Any) -> None:
        if self._in_hand.pop(act.__self__, None) is None:
            self._acknowledge(act, args, kwargs)
