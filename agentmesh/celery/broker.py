"""Queries to a broker: whether it is safe to use, how long its queues are, how many workers consume from them."""

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

import amqp
from celery import Celery
from kombu.exceptions import ChannelError, OperationalError
from redis.exceptions import RedisError

from agentmesh.celery.app import without_password
from agentmesh.celery.publish_connection import CONNECTION_ERRORS
from agentmesh.celery.rabbitmq import declare_queues, on_rabbit, with_socket_limits
from agentmesh.errors import ConfigError, ServiceDown

QUEUE_LENGTH_TIMEOUT_S = 2.0  # of a query for the length of a queue


def check_broker(app: Celery) -> None:
    """Check that the broker responds and does not evict messages.

    Raises:
        ServiceDown: it does not respond.
        ConfigError: its eviction policy would drop messages.
    """
    url = app.conf.broker_url or app.connection_for_read().as_uri()
    try:
        with app.connection_for_write(connect_timeout=3) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=3)
            client = getattr(connection.default_channel, "client", None)
            policy = (
                client.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction") if client else "noeviction"
            )
    except (OperationalError, OSError) as e:
        raise ServiceDown(
            f"no broker responds at {without_password(url)} ({e.__cause__ or e})",
            hint="start one, or leave `broker` empty for the embedded one",
        ) from None
    if policy != "noeviction":
        raise ConfigError(
            f"the broker at {without_password(url)} would evict messages and journals when memory is short (maxmemory-policy {policy!r})",
            hint="set `maxmemory-policy noeviction`",
        )


class QueueLengths:
    """Counts the messages that wait in broker queues, over one connection until `close`; for one thread."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Any = None

    def __call__(self, queues: Sequence[str]) -> dict[str, int]:
        """How many wait in each; {} when the broker does not respond."""
        try:
            if self._connection is None:
                self._connection = _with_timeout(self._app.connection_for_read())
            if on_rabbit(self._app):
                return declare_queues(with_socket_limits(self._connection), queues)
            return {q: _queue_length(self._connection.default_channel, q) for q in queues}
        except Exception as e:
            broken = self._connection.connection_errors if self._connection is not None else ()
            self.close()
            if not isinstance(e, (*CONNECTION_ERRORS, *broken)):  # redis-py's errors are not OSErrors
                raise
            return {}

    def close(self) -> None:
        """Close the connection; the next count makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # the connection may be what failed
                connection.collect(socket_timeout=1.0)


def _with_timeout(connection: Any) -> Any:
    """The connection with a timeout for a Redis server that does not respond: the thread has leases to renew."""
    if connection.get_transport_cls().driver_type == "redis":
        options = {"socket_timeout": QUEUE_LENGTH_TIMEOUT_S, "socket_connect_timeout": QUEUE_LENGTH_TIMEOUT_S}
        connection.transport_options = {**(connection.transport_options or {}), **options}
    return connection


def _queue_length(channel: Any, queue: str) -> int:
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError:
        return 0  # Redis keeps no empty list


# ---- Consumers of a queue -----------------------------------------------------------------------

CONSUMERS_TIMEOUT_S = 3.0


def consumer_client_name(queues: Sequence[str]) -> str:
    """A unique name for the Redis connections of one worker, with the queues it consumes from."""
    return f"agentmesh-{uuid.uuid4().hex}:{','.join(queues)}"


def consumer_count(app: Celery, queue: str) -> int | None:
    """How many workers consume from this broker queue; None where the broker does not respond or cannot tell."""
    try:
        with app.connection_for_read(connect_timeout=CONSUMERS_TIMEOUT_S) as connection:
            if on_rabbit(app):
                return _rabbit_consumers(with_socket_limits(connection), queue)
            connection.ensure_connection(max_retries=1, timeout=CONSUMERS_TIMEOUT_S)
            client = getattr(connection.default_channel, "client", None)
            return None if client is None else _count_named_clients(client, queue)
    except (*CONNECTION_ERRORS, RedisError):  # RedisError: also without the right to list clients
        return None


def _rabbit_consumers(connection: Any, queue: str) -> int:
    with contextlib.suppress(amqp.NotFound):
        return int(connection.channel().queue_declare(queue, passive=True).consumer_count)
    return 0


def _count_named_clients(client: Any, queue: str) -> int:
    """How many distinct names: a worker has several connections of one name."""
    db = str(client.connection_pool.connection_kwargs.get("db", 0))
    names = {c["name"] for c in client.client_list() if c["db"] == db and c["name"].startswith("agentmesh-")}
    return sum(queue in name.partition(":")[2].split(",") for name in names)
