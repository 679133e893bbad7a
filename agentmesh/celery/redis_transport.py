"""kombu's Redis transport, changed to take as many messages at once as the worker has room for.

One BRPOP a message costs two system calls of the worker and one wake-up of the server. BLMPOP with a count is the same
blocking pop, and under load one serves many messages. It needs Redis 7 or any Valkey, as the journal's scripts do.

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
json_loads: Any = json.loads
MALFORMED = (ValueError, TypeError, LookupError, AttributeError)  # what parsing a malformed message raises
base: Any = virtual.QoS
MAX_BATCH = 100  # messages of one pop: the first of them waits until all are parsed


class PrefetchRoom(base):  # type: ignore[misc]  # no types
    """Counts what was taken and not acked; `admits` can limit it further, where something is scarcer than places."""

    admits: Callable[[int], int] | None = None  # gets how many are in flight, returns how many more may be taken
    in_pool: Callable[[], int] = staticmethod(lambda: 0)  # how many run, also of an earlier connection
    arriving = ""  # the queue of the messages being delivered
    at_once = False  # whether the next pop returns at once, also with nothing
    leaving: Callable[[], bool] = staticmethod(lambda: False)  # whether the worker takes no more messages

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._urgent: set[str] = set()  # tags of the realtime lane

    def append(self, message: Any, delivery_tag: str) -> None:
        """Count a message that was taken."""
        super().append(message, delivery_tag)
        if isinstance(self.admits, Lanes) and self.admits.is_urgent(self.arriving):
            self._urgent.add(delivery_tag)

    @property
    def urgent(self) -> int:
        """How many messages of the realtime lane were taken and not acked."""
        self._urgent = {tag for tag in self._urgent if tag in self._delivered and tag not in self._dirty}
        return len(self._urgent)

    @property
    def narrow(self) -> bool:
        """Whether all free places are reserved for the realtime lane."""
        if not isinstance(self.admits, Lanes):
            return False
        room = self.can_consume_max_estimate()
        return room is not None and 0 < room <= self.admits.still_reserved(self.urgent)

    def can_consume(self) -> bool:
        """Whether one more may be taken."""
        return self.can_consume_max_estimate() != 0

    def can_consume_max_estimate(self) -> int | None:
        """How many more may be taken; None is without limit."""
        most: int | None = super().can_consume_max_estimate()
        if self.admits is None:
            return most
        more = max(0, self.admits(max(len(self._delivered) - len(self._dirty), self.in_pool())))
        return more if most is None else min(most, more)


class BatchChannel(kombu.Channel):  # type: ignore[misc]  # no types
    """A channel whose blocking pop takes up to `MAX_BATCH` messages, never more than the prefetch count has room for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.ack_emulation:
            self.QoS: Any = PrefetchRoom

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.global_keyprefix:  # kombu can prefix the keys of its own commands only
            super()._brpop_start(timeout)
            return
        if isinstance(self.qos, PrefetchRoom) and self.qos.leaving():
            raise TimeoutError  # leaves kombu's drain_events, which would pop again until its timeout
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
        """Pop without a wait in the server, where an empty pop may end a tenth of a second late."""
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

    def _deliver_all(self, reply: Any) -> None:
        queue = _text(reply[0]).rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        self.qos.arriving = queue
        for item in reply[1]:
            try:
                self.connection._deliver(json_loads(_text(item)), queue)
            except MALFORMED as e:  # the other messages of this pop are delivered
                logger.error("dropped a malformed message from %s (%r): %.200r", queue, e, item)


class BatchTransport(kombu.Transport):  # type: ignore[misc]  # no types
    """The transport with `BatchChannel`."""

    Channel = BatchChannel


def _text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw


def enable_batching(connection: Any) -> None:
    """Make a connection that is not open yet take many messages at once; does nothing unless it is plain Redis."""
    if connection.get_transport_cls() is kombu.Transport:
        connection.transport_cls = BatchTransport
