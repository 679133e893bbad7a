"""One connection that a publisher sends over: to RabbitMQ with many messages unconfirmed at once, to any other broker one by one."""

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
CONFIRM_TIMEOUT_S = 10.0  # a broker that confirms nothing for so long is taken for dead
# AttributeError: py-amqp's connection after somebody closed it
CONNECTION_ERRORS = (OperationalError, OSError, MeshError, amqp.AMQPError, AttributeError)


class PublishConnection(Protocol):
    """A connection to a broker, for one thread."""

    PATIENCE_S: ClassVar[float]  # how long to listen for when there is nothing to send

    def open(self) -> None:
        """Connect."""
        ...

    @property
    def room(self) -> bool:
        """Whether it takes another message now."""
        ...

    def send(self, sent: OutboxMessage) -> None:
        """Hand one message over."""
        ...

    def unconfirmed(self) -> Sequence[OutboxMessage]:
        """What was handed over and the broker has not said that it has, oldest first."""
        ...

    def listen(self, timeout_s: float) -> None:
        """Hear the broker, until there is something to do again."""
        ...

    def close(self) -> None:
        """Give the connection back."""
        ...


class ConfirmedConnection:
    """A channel of RabbitMQ in confirm mode: messages go out without waiting, and are kept until the broker has them.

    A queue that is not there is declared before the first message to it; one that was deleted meanwhile returns its
    message, which then goes out again.
    """

    PATIENCE_S: ClassVar[float] = 1.0

    def __init__(self, app: Celery, bell: Waker) -> None:
        self._app, self._bell = app, bell
        self._kept: dict[int, OutboxMessage] = {}
        self._declared: set[str] = set()
        self._returned: list[int] = []
        self._blocked = False
        self._heard = 0.0
        self._connection: Any = None
        self._open = contextlib.ExitStack()
        self._tag = 0

    def open(self) -> None:
        """See Link."""
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
        self._waiter = self._open.enter_context(self._bell.beside(wire.sock))
        self._heard = monotonic()

    @property
    def room(self) -> bool:
        """See Link."""
        return len(self._kept) < MAX_UNCONFIRMED and not self._blocked

    def send(self, sent: OutboxMessage) -> None:
        """See Link."""
        if sent.queue not in self._declared:
            declare_queues(self._connection, [sent.queue])
            self._declared.add(sent.queue)
        if not self._kept:
            self._heard = monotonic()
        message = json.loads(sent.body)
        self._tag += 1
        self._channel.basic_publish(
            amqp.Message(
                message["body"], content_type=message["content-type"], content_encoding=message["content-encoding"],
                application_headers=message["headers"], correlation_id=message["properties"]["correlation_id"],
                delivery_mode=2, message_id=str(self._tag),
            ),
            exchange="", routing_key=sent.queue, mandatory=True,
        )  # fmt: skip
        self._kept[self._tag] = sent

    def unconfirmed(self) -> Sequence[OutboxMessage]:
        """See Link."""
        return list(self._kept.values())

    def listen(self, timeout_s: float) -> None:
        """See Link."""
        if not drain_events(self._connection):
            self._waiter.wait(timeout_s)
            drain_events(self._connection)
        self._connection.heartbeat_check()
        if self._kept and not self._blocked and monotonic() - self._heard > CONFIRM_TIMEOUT_S:
            raise OSError(f"{len(self._kept)} messages were not confirmed within {CONFIRM_TIMEOUT_S:.0f} s")
        while self._returned and self.room:
            sent = self._kept.pop(self._returned.pop(), None)
            if sent is not None:
                self._declared.discard(sent.queue)
                self.send(sent)

    def close(self) -> None:
        """See Link."""
        self._open.close()
        if self._connection is not None:
            with contextlib.suppress(Exception):  # it may be what failed
                self._connection.collect(socket_timeout=1.0)

    # ---- what the broker says ----
    def _on_ack(self, tag: int, multiple: bool) -> None:
        self._heard = monotonic()
        for done in self._tags(tag, multiple):
            if done not in self._returned:  # RabbitMQ confirms what it has returned, too
                del self._kept[done]

    def _on_nack(self, tag: int, multiple: bool) -> None:
        self._heard = monotonic()
        refused = [self._kept.pop(one) for one in self._tags(tag, multiple)]
        log.warning(
            "RabbitMQ rejected %d messages for %s; sweeps re-send them", len(refused), {s.queue for s in refused}
        )

    def _on_return(self, why: Exception, exchange: str, queue: str, message: Any) -> None:
        self._returned.append(int(message.properties["message_id"]))

    def _tags(self, tag: int, multiple: bool) -> list[int]:
        if not multiple:
            return [tag] if tag in self._kept else []
        done = []
        for one in self._kept:  # in the order they were sent
            if one > tag:
                break
            done.append(one)
        return done

    def _on_blocked(self, why: Any = None) -> None:
        log.warning("RabbitMQ is low on memory or disk and accepts no messages for now")
        self._blocked = True

    def _on_unblocked(self) -> None:
        self._blocked, self._heard = False, monotonic()


class PlainConnection:
    """Any other broker, through kombu's producer."""

    PATIENCE_S: ClassVar[float] = 60.0

    def __init__(self, app: Celery, bell: Waker) -> None:
        self._app, self._bell = app, bell
        self._open = contextlib.ExitStack()
        self._producer: Any = None

    def open(self) -> None:
        """See Link."""
        connection = self._open.enter_context(self._app.connection_for_write())
        self._producer = self._app.amqp.Producer(connection)
        self._waiter = self._open.enter_context(self._bell.beside())

    @property
    def room(self) -> bool:
        """See Link."""
        return True

    def send(self, sent: OutboxMessage) -> None:
        """See Link."""
        message = json.loads(sent.body)
        self._producer.publish(
            message["body"], exchange="", routing_key=sent.queue, headers=message["headers"],
            content_type=message["content-type"], content_encoding=message["content-encoding"],
            correlation_id=message["properties"]["correlation_id"], delivery_mode=2, retry=True,
            retry_policy={"max_retries": 3, "interval_start": 0.1},
        )  # fmt: skip

    def unconfirmed(self) -> Sequence[OutboxMessage]:
        """See Link."""
        return ()

    def listen(self, timeout_s: float) -> None:
        """See Link."""
        self._waiter.wait(timeout_s)

    def close(self) -> None:
        """See Link."""
        with contextlib.suppress(Exception):
            self._open.close()
