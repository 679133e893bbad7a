"""Consuming from RabbitMQ only what there is room for, the most urgent lane first.

RabbitMQ cannot be asked for the next message of the first queue that has one. So of each queue one message waits here,
un-acked; it is acked when it is let in, and then the next one comes. The rest stays in the broker, for whoever has room.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any

from agentmesh.celery.lanes import Lanes
from agentmesh.celery.rabbitloop import Unacked


class Admission(Unacked):
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

    def hand_on(self) -> None:
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

    def settle(self, act: Any, args: Any, kwargs: Any) -> Any:
        """A step's end, from any thread: there is room at once."""
        self._consumer._pending_operations.append(lambda: self._ended(act, args, kwargs))
        self.bell.ring()
        return act

    def _ended(self, act: Any, args: Any, kwargs: Any) -> None:
        if self._in_hand.pop(act.__self__, None) is None:
            self._settle(act, args, kwargs)
