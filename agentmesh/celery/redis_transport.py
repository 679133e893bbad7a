"""kombu's Redis transport, which takes as many messages at once as the worker has room for.

One BRPOP a message is two system calls of the worker and one wake-up of the server a message. BLMPOP with a count is the
same blocking pop, and under load one for many. Redis 7 and any Valkey have it, as the journal's scripts need them to.

Source: https://redis.io/docs/latest/commands/blmpop/
"""

from collections.abc import Callable
from queue import Empty
from time import monotonic
from typing import Any

from celery.utils.log import get_logger
from kombu.transport import redis, virtual
from kombu.utils import json
from redis.exceptions import ConnectionError

from agentmesh.celery.lanes import Lanes

logger = get_logger("agentmesh.consumer")

kombu: Any = redis  # kombu's functions have no types
loads: Any = json.loads
MALFORMED = (ValueError, TypeError, LookupError, AttributeError)  # what the reading of a strange message raises
base: Any = virtual.QoS
MAX_BATCH = 100  # at once: more would make one worker's first message wait for the parsing of its last


class PrefetchRoom(base):  # type: ignore[misc]  # no types
    """Counts what was taken and not acked; whoever has something scarcer than places says how many more may come."""

    admits: Callable[[int], int] | None = None  # gets how many are in hand
    in_pool: Callable[[], int] = staticmethod(lambda: 0)  # how many go on, also of an earlier connection
    arriving = ""  # the queue of the messages that are being read
    at_once = False  # whether the next pop comes back with what is there, and waits for nothing
    leaving: Callable[[], bool] = staticmethod(lambda: False)  # whether the worker takes nothing more

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._urgent: set[str] = set()  # tags of the realtime lane

    def append(self, message: Any, delivery_tag: str) -> None:
        """A message was taken."""
        super().append(message, delivery_tag)
        if isinstance(self.admits, Lanes) and self.admits.is_urgent(self.arriving):
            self._urgent.add(delivery_tag)

    @property
    def urgent(self) -> int:
        """How many of the realtime lane were taken and not acked."""
        self._urgent = {tag for tag in self._urgent if tag in self._delivered and tag not in self._dirty}
        return len(self._urgent)

    @property
    def narrow(self) -> bool:
        """Whether what room there is is kept for the realtime lane."""
        if not isinstance(self.admits, Lanes):
            return False
        room = self.can_consume_max_estimate()
        return room is not None and 0 < room <= self.admits.kept(self.urgent)

    def can_consume(self) -> bool:
        """Whether one more may be taken."""
        return self.can_consume_max_estimate() != 0

    def can_consume_max_estimate(self) -> int | None:
        """How many more may be taken; None is any number."""
        most: int | None = super().can_consume_max_estimate()
        if self.admits is None:
            return most
        more = max(0, self.admits(max(len(self._delivered) - len(self._dirty), self.in_pool())))
        return more if most is None else min(most, more)


class BatchChannel(kombu.Channel):  # type: ignore[misc]  # no types
    """A channel whose blocking pop brings up to `MAX_BATCH` messages, never more than the prefetch count leaves room for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.ack_emulation:
            self.QoS: Any = PrefetchRoom

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.global_keyprefix:  # kombu knows where the keys stand in the commands it uses itself, and in no others
            super()._brpop_start(timeout)
            return
        if isinstance(self.qos, PrefetchRoom) and self.qos.leaving():
            raise TimeoutError  # out of kombu's drain_events, which would pop again until its time is over
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        room = self.qos.can_consume_max_estimate()
        wait_s = (self.brpop_timeout if timeout is None else timeout) or 0
        lanes = getattr(self.qos, "admits", None)
        if isinstance(lanes, Lanes):
            queues, room, wait_s = lanes.order(queues, room, wait_s, self.qos.urgent)
        keys = [self._q_for_pri(queue, priority) for priority in self.priority_steps for queue in queues]
        count = MAX_BATCH if room is None else max(1, min(MAX_BATCH, room))
        if getattr(self.qos, "at_once", False):
            self._pop_at_once(keys, count)
            return
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self.client.connection.send_command("BLMPOP", wait_s, len(keys), *keys, "RIGHT", "COUNT", count)

    def _pop_at_once(self, keys: list[str], count: int) -> None:
        """Without a wait in the server: a pop there that nothing comes for may end a tenth of a second late."""
        connection = self.client.connection
        try:
            connection.send_command("LMPOP", len(keys), *keys, "RIGHT", "COUNT", count)
            if not connection.can_read(timeout=self.health_check_interval or None):
                raise ConnectionError("the broker does not respond")
            reply = self.client.parse_response(connection, "LMPOP")
        except self.connection_errors:
            connection.disconnect()
            raise
        if reply:
            self._deliver_all(reply)

    def _brpop_read(self, **options: Any) -> bool:
        if self.global_keyprefix:
            return bool(super()._brpop_read(**options))
        try:
            try:
                reply = self.client.parse_response(self.client.connection, "BLMPOP", **options)
            except self.connection_errors:
                self.client.connection.disconnect()
                raise
            if not reply:
                raise Empty
            self._deliver_all(reply)
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _deliver_all(self, found: Any) -> None:
        queue = _text(found[0]).rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        self.qos.arriving = queue
        for item in found[1]:
            try:
                self.connection._deliver(loads(_text(item)), queue)
            except MALFORMED as e:  # the others of this pop are messages
                logger.error("dropped a malformed message from %s (%r): %.200r", queue, e, item)


class BatchTransport(kombu.Transport):  # type: ignore[misc]  # no types
    """The transport with that channel."""

    Channel = BatchChannel


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw


def enable_batching(connection: Any) -> None:
    """Have a connection that is not yet connected take many messages at once; one that is no plain Redis stays as it is."""
    if connection.get_transport_cls() is kombu.Transport:
        connection.transport_cls = BatchTransport
