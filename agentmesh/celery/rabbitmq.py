"""RabbitMQ as the broker: quorum queues that we declare, connections with bounded sockets, and facts about a server."""

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

# The default of RabbitMQ 4. Without one, as in 3.x, a message that kills workers is redelivered for ever.
DELIVERY_LIMIT = 20
ARGUMENTS = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
HEARTBEAT_S = 5.0  # a silent half-open connection is noticed after two of them
SOCKET_TIMEOUT_S = 10.0  # no single read or write may take longer


def on_rabbit(app: Celery) -> bool:
    """Whether the app's broker is RabbitMQ."""
    return is_amqp(str(app.conf.broker_read_url or app.conf.broker_url or ""))


def with_socket_limits(connection: Any, *, confirms: bool | None = None) -> Any:
    """The connection, not open yet, with timeouts of its socket; options that the app has set stay.

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
    """The heartbeat of connections in seconds; 0 where the app has none."""
    interval_s = float(app.conf.broker_heartbeat or 0)
    return min(interval_s, HEARTBEAT_S)


def kombu_queue(name: str) -> Any:
    """A queue for kombu to consume from; `declare_queues` declares it."""
    queue: Any = BrokerQueue  # kombu has no types for them
    exchange: Any = Exchange
    return queue(name, exchange(""), routing_key=name, queue_arguments=ARGUMENTS, no_declare=True)


def declare_as_ours(queue: Any) -> None:
    """Make kombu declare this queue as `declare_queues` does, not as the app's conf says."""
    exchange: Any = Exchange
    queue.exchange, queue.routing_key, queue.queue_arguments = exchange(""), queue.name, dict(ARGUMENTS)


def declare_queues(connection: Any, queues: Iterable[str]) -> dict[str, int]:
    """Declare our queues; returns how many messages wait in each.

    A queue that exists with other arguments is used as it is; `agentmesh doctor` reports it.

    Raises:
        ConfigError: a queue does not exist, and this user may not declare it.
    """
    lengths = {}
    channel = connection.channel()  # of its own, because a refusal closes it
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
            f"RabbitMQ does not let this user declare the queue {queue!r} ({refused})",
            hint=f"declare it with {ARGUMENTS!r}, or give the user permission to configure queues that begin with 'agentmesh.'",
        ) from None


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """A RabbitMQ server and our queues on it.

    Args:
        version: of the server.
        messages: how many wait in each of our queues that exist.
        other: our queues that exist with other arguments, each with RabbitMQ's reply.
    """

    version: str
    messages: dict[str, int]
    other: dict[str, str]


def inspect_broker(app: Celery, queues: Sequence[str]) -> BrokerFacts:
    """Query the server and those of our queues that exist; declares none."""
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
    """Wakes a thread that waits on sockets; from any thread."""

    def __init__(self) -> None:
        self._read_end, self._write_end = socket.socketpair()
        self._read_end.setblocking(False)
        self._write_end.setblocking(False)
        self._is_set = False

    def wake(self) -> None:
        """End the current wait, or else the next one."""
        if not self._is_set:
            self._is_set = True
            with contextlib.suppress(OSError):
                self._write_end.send(b"1")

    @contextlib.contextmanager
    def waiter(self, *sockets: socket.socket) -> Iterator["Waiter"]:
        """A waiter for this waker and these sockets."""
        with selectors.DefaultSelector() as selector:
            for sock in (self._read_end, *sockets):
                selector.register(sock, selectors.EVENT_READ)
            yield Waiter(selector, self)

    def clear_if(self, ready: object) -> None:
        """Clear it, if `ready` is its own socket."""
        if ready is self._read_end:
            with contextlib.suppress(OSError):
                self._read_end.recv(64)
            self._is_set = False  # last: what was done before a `wake` that comes before this line is seen after it

    def close(self) -> None:
        """Close its sockets."""
        self._read_end.close()
        self._write_end.close()


class Waiter:
    """Waits for a waker or a socket."""

    def __init__(self, selector: selectors.BaseSelector, waker: Waker) -> None:
        self._selector, self._waker = selector, waker

    def wait(self, timeout_s: float) -> None:
        """Return when one of them is ready, or after the timeout."""
        for key, _ in self._selector.select(timeout_s):
            self._waker.clear_if(key.fileobj)


def drain_events(connection: Any, limit: int = 100) -> bool:
    """Handle what the broker has sent, up to `limit` methods; whether there may be more."""
    try:
        for _ in range(limit):
            connection.drain_events(timeout=0)
    except TimeoutError:
        return False
    return True
