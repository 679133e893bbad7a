"""The connection of a publisher: to RabbitMQ with many unconfirmed messages at once, to any other broker one by one."""

import contextlib
import json
import logging
from collections.abc import Sequence
from time import monotonic
from typing import Any, ClassVar, Protocol

import amqp
from celery import Celery
from kombu.exceptions import OperationalError

from agentmesh.celery.rabbitmq import Waker, declare_queues, drain_events, heartbeat_s, with_socket_limits
from agentmesh.errors import MeshError
from agentmesh.journal.types import OutboxMessage

log = logging.getLogger("agentmesh")

MAX_UNCONFIRMED = 1_000
CONFIRM_TIMEOUT_S = 10.0  # a broker that confirms nothing for so long is regarded as dead
# AttributeError: py-amqp raises it on a connection that was closed
CONNECTION_ERRORS = (OperationalError, OSError, MeshError, amqp.AMQPError, AttributeError)


class PublishConnection(Protocol):
    """A connection to a broker, for one thread."""

    IDLE_LISTEN_S: ClassVar[float]  # how long to listen when there is nothing to send

    def open(self) -> None:
        """Connect."""
        ...

    @property
    def room(self) -> bool:
        """Whether it can send another message now."""
        ...

    def send(self, message: OutboxMessage) -> None:
        """Send one message."""
        ...

    def unconfirmed(self) -> Sequence[OutboxMessage]:
        """The messages that were sent and not confirmed by the broker, oldest first."""
        ...

    def listen(self, timeout_s: float) -> None:
        """Handle what the broker sends, until there is something to send or the timeout."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class ConfirmedConnection:
    """A channel of RabbitMQ in confirm mode: messages go out without waiting, and are kept until they are confirmed.

    A queue that does not exist is declared before the first message to it. RabbitMQ returns a message to a queue that was
    deleted in the meantime; it is then sent again.
    """

    IDLE_LISTEN_S: ClassVar[float] = 1.0

    def __init__(self, app: Celery, waker: Waker) -> None:
        self._app, self._waker = app, waker
        self._unconfirmed: dict[int, OutboxMessage] = {}
        self._declared: set[str] = set()
        self._returned: list[int] = []
        self._blocked = False
        self._confirmed_s = 0.0
        self._connection: Any = None
        self._open = contextlib.ExitStack()
        self._tag = 0

    def open(self) -> None:
        """See PublishConnection."""
        self._connection = with_socket_limits(
            self._app.connection_for_write(heartbeat=int(heartbeat_s(self._app))), confirms=False
        )
        self._connection.connect()
        wire = self._connection.connection
        wire.on_blocked, wire.on_unblocked = self._on_blocked, self._on_unblocked
        self._channel = self._connection.channel()
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._on_ack)
        self._channel.events["basic_nack"].add(self._on_nack)
        self._channel.events["basic_return"].add(self._on_return)
        self._waiter = self._open.enter_context(self._waker.waiter(wire.sock))
        self._confirmed_s = monotonic()

    @property
    def room(self) -> bool:
        """See PublishConnection."""
        return len(self._unconfirmed) < MAX_UNCONFIRMED and not self._blocked

    def send(self, message: OutboxMessage) -> None:
        """See PublishConnection."""
        if message.queue not in self._declared:
            declare_queues(self._connection, [message.queue])
            self._declared.add(message.queue)
        if not self._unconfirmed:
            self._confirmed_s = monotonic()
        task = json.loads(message.body)
        self._tag += 1
        self._channel.basic_publish(
            amqp.Message(
                task["body"], content_type=task["content-type"], content_encoding=task["content-encoding"],
                application_headers=task["headers"], correlation_id=task["properties"]["correlation_id"],
                delivery_mode=2, message_id=str(self._tag),
            ),
            exchange="", routing_key=message.queue, mandatory=True,
        )  # fmt: skip
        self._unconfirmed[self._tag] = message

    def unconfirmed(self) -> Sequence[OutboxMessage]:
        """See PublishConnection."""
        return list(self._unconfirmed.values())

    def listen(self, timeout_s: float) -> None:
        """See PublishConnection."""
        if not drain_events(self._connection):
            self._waiter.wait(timeout_s)
            drain_events(self._connection)
        self._connection.heartbeat_check()
        if self._unconfirmed and not self._blocked and monotonic() - self._confirmed_s > CONFIRM_TIMEOUT_S:
            raise OSError(f"{len(self._unconfirmed)} messages were not confirmed within {CONFIRM_TIMEOUT_S:.0f} s")
        while self._returned and self.room:
            message = self._unconfirmed.pop(self._returned.pop(), None)
            if message is not None:
                self._declared.discard(message.queue)
                self.send(message)

    def close(self) -> None:
        """See PublishConnection."""
        self._open.close()
        if self._connection is not None:
            with contextlib.suppress(Exception):  # the connection may be what failed
                self._connection.collect(socket_timeout=1.0)

    # ---- callbacks ----
    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._confirmed_s = monotonic()
        for confirmed in self._tags(tag, multiple):
            if confirmed not in self._returned:  # RabbitMQ also confirms what it has returned
                del self._unconfirmed[confirmed]

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._confirmed_s = monotonic()
        rejected = [self._unconfirmed.pop(t) for t in self._tags(tag, multiple)]
        log.warning(
            "RabbitMQ rejected %d messages for %s; sweeps re-send them",
            len(rejected),
            {message.queue for message in rejected},
        )

    def _on_return(self, error: Exception, exchange: str, queue: str, message: Any) -> None:
        self._returned.append(int(message.properties["message_id"]))

    def _tags(self, tag: int, multiple: bool) -> list[int]:
        if not multiple:
            return [tag] if tag in self._unconfirmed else []
        tags = []
        for sent_tag in self._unconfirmed:  # in the order they were sent
            if sent_tag > tag:
                break
            tags.append(sent_tag)
        return tags

    def _on_blocked(self, reason: Any = None) -> None:
        log.warning("RabbitMQ is low on memory or disk and accepts no messages for now")
        self._blocked = True

    def _on_unblocked(self) -> None:
        self._blocked, self._confirmed_s = False, monotonic()


class PlainConnection:
    """Any other broker, through kombu's producer."""

    IDLE_LISTEN_S: ClassVar[float] = 60.0

    def __init__(self, app: Celery, waker: Waker) -> None:
        self._app, self._waker = app, waker
        self._open = contextlib.ExitStack()
        self._producer: Any = None

    def open(self) -> None:
        """See PublishConnection."""
        connection = self._open.enter_context(self._app.connection_for_write())
        self._producer = self._app.amqp.Producer(connection)
        self._waiter = self._open.enter_context(self._waker.waiter())

    @property
    def room(self) -> bool:
        """See PublishConnection."""
        return True

    def send(self, message: OutboxMessage) -> None:
        """See PublishConnection."""
        task = json.loads(message.body)
        self._producer.publish(
            task["body"], exchange="", routing_key=message.queue, headers=task["headers"],
            content_type=task["content-type"], content_encoding=task["content-encoding"],
            correlation_id=task["properties"]["correlation_id"], delivery_mode=2, retry=True,
            retry_policy={"max_retries": 3, "interval_start": 0.1},
        )  # fmt: skip

    def unconfirmed(self) -> Sequence[OutboxMessage]:
        """See PublishConnection."""
        return ()

    def listen(self, timeout_s: float) -> None:
        """See PublishConnection."""
        self._waiter.wait(timeout_s)

    def close(self) -> None:
        """See PublishConnection."""
        with contextlib.suppress(Exception):
            self._open.close()
