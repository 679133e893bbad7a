"""RabbitMQ as the broker: quorum queues of our own, connections that notice their death, and what is asked of a server."""

import contextlib
import selectors
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import amqp
from celery import Celery
from kombu.entity import Exchange
from kombu.entity import Queue as BrokerQueue

from agentmesh.celery.app import is_amqp
from agentmesh.errors import ConfigError

DELIVERY_LIMIT = (
    20  # what RabbitMQ 4 takes by itself; 3.x takes none, and a message that kills its worker would stay for ever
)
ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
HEARTBEAT_S = 5.0  # a silent half-open connection is noticed after two of them
SOCKET_TIMEOUT_S = 10.0  # no single read or write may take longer


def on_rabbit(app: Celery) -> bool:
    """Whether the app's broker is RabbitMQ."""
    return is_amqp(str(app.conf.broker_read_url or app.conf.broker_url or ""))


def with_socket_limits(connection: Any, *, confirms: bool | None = None) -> Any:
    """The connection, not yet open, with bounds on its socket; the app's own options stay where they say something.

    Args:
        confirms: whether each publish on it waits for the broker; None leaves that to the app.
    """
    options = dict(connection.transport_options or {})
    ours = {"read_timeout": SOCKET_TIMEOUT_S, "write_timeout": SOCKET_TIMEOUT_S, **options}
    if confirms is not None:
        ours["confirm_publish"] = confirms
    connection.transport_options = ours
    return connection


def heartbeat_s(app: Celery) -> float:
    """How often both sides of a connection say that they are there; 0 where the app wants none."""
    interval_s = float(app.conf.broker_heartbeat or 0)
    return min(interval_s, HEARTBEAT_S)


def kombu_queue(name: str) -> Any:
    """A queue as kombu consumes from it; `declare_queues` makes it."""
    queue: Any = BrokerQueue  # kombu has no types for them
    exchange: Any = Exchange
    return queue(name, exchange(""), routing_key=name, queue_arguments=ARGUMENTS, no_declare=True)


def declare_as_ours(queue: Any) -> None:
    """Have a queue that kombu would declare as the app's conf says declared as `declare_queues` does."""
    exchange: Any = Exchange
    queue.exchange, queue.routing_key, queue.queue_arguments = exchange(""), queue.name, dict(ARGUMENTS)


def declare_queues(connection: Any, queues: Iterable[str]) -> dict[str, int]:
    """Make our queues where they are not; how many messages wait in each.

    A queue that is there with other arguments is used as it is: an administrator may know better, and `doctor` tells.

    Raises:
        ConfigError: a queue is not there and may not be made.
    """
    lengths = {}
    channel = connection.channel()  # of its own: a refusal closes it, and with it whatever else it was for
    try:
        for queue in queues:
            try:
                declared = channel.queue_declare(queue, durable=True, auto_delete=False, arguments=ARGUMENTS)
            except (amqp.PreconditionFailed, amqp.AccessRefused) as refused:
                declared = _declared_otherwise(channel, queue, refused)
            lengths[queue] = int(declared.message_count)
    finally:
        with contextlib.suppress(Exception):  # the connection may be what failed
            channel.close()
    return lengths


def _declared_otherwise(channel: Any, queue: str, refused: Exception) -> Any:
    try:
        return channel.queue_declare(queue, passive=True)
    except amqp.NotFound:
        raise ConfigError(
            f"RabbitMQ does not let this user make the queue {queue!r} ({refused}): make it with {ARGUMENTS!r}, or give "
            "the user the permission to configure queues that begin with 'agentmesh.'"
        ) from None


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """What a RabbitMQ says of itself and of our queues.

    Args:
        other: our queues that are there with other arguments, each with what RabbitMQ says of it.
    """

    version: str
    messages: dict[str, int]
    other: dict[str, str]


def inspect_broker(app: Celery, queues: Sequence[str]) -> BrokerFacts:
    """Look at the server and at those of our queues that are there; makes none."""
    messages, other = {}, {}
    with with_socket_limits(app.connection_for_read(connect_timeout=3)) as connection:
        connection.connect()
        version = str(connection.connection.server_properties.get("version", "?"))
        channel = connection.channel()
        for queue in queues:
            try:
                messages[queue] = int(channel.queue_declare(queue, passive=True).message_count)
                channel.queue_declare(queue, durable=True, auto_delete=False, arguments=ARGUMENTS)
            except amqp.NotFound:
                continue
            except (amqp.PreconditionFailed, amqp.AccessRefused) as refused:
                other[queue] = refused.reply_text
    return BrokerFacts(version, messages, other)


class Waker:
    """Wakes a thread that waits on a socket; rung from any thread."""

    def __init__(self) -> None:
        self._heard, self._rung = socket.socketpair()
        self._heard.setblocking(False)
        self._rung.setblocking(False)
        self._is_rung = False

    def ring(self) -> None:
        """End the wait that is, or else the next one."""
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(OSError):
                self._rung.send(b"1")

    @contextlib.contextmanager
    def beside(self, *sockets: socket.socket) -> Iterator["Waiter"]:
        """A waiter for this bell and these sockets."""
        with selectors.DefaultSelector() as selector:
            for one in (self._heard, *sockets):
                selector.register(one, selectors.EVENT_READ)
            yield Waiter(selector, self)

    def hears(self, ready: object) -> None:
        """Forget that it rang, if `ready` is its own end."""
        if ready is self._heard:
            with contextlib.suppress(OSError):
                self._heard.recv(64)
            self._is_rung = False  # last: who rings before this line has put down before what is looked at after it

    def close(self) -> None:
        """Give back its sockets."""
        self._heard.close()
        self._rung.close()


class Waiter:
    """Waits for a bell or a socket."""

    def __init__(self, selector: selectors.BaseSelector, bell: Waker) -> None:
        self._selector, self._bell = selector, bell

    def wait(self, timeout_s: float) -> None:
        """Until one of them has something, at most so long."""
        for key, _ in self._selector.select(timeout_s):
            self._bell.hears(key.fileobj)


def drain_events(connection: Any, most: int = 100) -> bool:
    """Handle what the broker has sent, up to `most` methods; whether there may be more."""
    try:
        for _ in range(most):
            connection.drain_events(timeout=0)
    except TimeoutError:
        return False
    return True
