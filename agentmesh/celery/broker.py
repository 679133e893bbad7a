"""What a broker is asked: whether it is safe to use, how long its queues are, who consumes from them."""

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

CONNECT_TIMEOUT_S = 2.0  # how long a look at a queue may take


def check_broker(app: Celery) -> None:
    """Look whether the broker answers and keeps what it is given.

    Raises:
        ServiceDown: nobody answers.
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
            f"no broker responds at {without_password(url)} ({e.__cause__ or e}). Start one, or leave `broker` empty for the embedded one"
        ) from None
    if policy != "noeviction":
        raise ConfigError(
            f"the broker at {without_password(url)} would evict messages and journals when memory is short (maxmemory-policy {policy!r}): "
            "set `maxmemory-policy noeviction`"
        )


class QueueLengths:
    """Counts the messages waiting in broker queues, over a connection it keeps until `close`; for one thread."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Any = None

    def __call__(self, queues: Sequence[str]) -> dict[str, int]:
        """How many wait in each; nothing when the broker is away."""
        try:
            if self._connection is None:
                self._connection = _with_timeout(self._app.connection_for_read())
            if on_rabbit(self._app):
                return declare_queues(with_socket_limits(self._connection), queues)
            return {q: _queue_length(self._connection.default_channel, q) for q in queues}
        except Exception as e:
            broken = self._connection.connection_errors if self._connection is not None else ()
            self.close()  # nothing is known of its queues
            if not isinstance(e, (*CONNECTION_ERRORS, *broken)):  # redis-py's errors are no OSErrors
                raise
            return {}

    def close(self) -> None:
        """Give back the connection; the next count makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # it may be what failed
                connection.collect(socket_timeout=1.0)


def _with_timeout(connection: Any) -> Any:
    """A connection that gives a Redis server up which does not answer: whoever waits for it has leases to renew."""
    if connection.get_transport_cls().driver_type == "redis":
        options = {"socket_timeout": CONNECT_TIMEOUT_S, "socket_connect_timeout": CONNECT_TIMEOUT_S}
        connection.transport_options = {**(connection.transport_options or {}), **options}
    return connection


def _queue_length(channel: Any, queue: str) -> int:
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError:
        return 0  # Redis keeps no empty list


# ---- Which workers take from a queue now, asked of the broker -----------------------------------

REPLY_TIMEOUT_S = 3.0


def consumer_client_name(queues: Sequence[str]) -> str:
    """A name for the Redis connections of a worker of these broker queues, and no other's."""
    return f"agentmesh-{uuid.uuid4().hex}:{','.join(queues)}"


def consumer_count(app: Celery, queue: str) -> int | None:
    """How many workers take from this broker queue; None where the broker is away or does not tell."""
    try:
        with app.connection_for_read(connect_timeout=REPLY_TIMEOUT_S) as connection:
            if on_rabbit(app):
                return _consumers(with_socket_limits(connection), queue)
            connection.ensure_connection(max_retries=1, timeout=REPLY_TIMEOUT_S)
            client = getattr(connection.default_channel, "client", None)
            return None if client is None else _named(client, queue)
    except (*CONNECTION_ERRORS, RedisError):  # RedisError: no right to list clients, too
        return None


def _consumers(connection: Any, queue: str) -> int:
    with contextlib.suppress(amqp.NotFound):
        return int(connection.channel().queue_declare(queue, passive=True).consumer_count)
    return 0


def _named(client: Any, queue: str) -> int:
    """A worker has several connections."""
    db = str(client.connection_pool.connection_kwargs.get("db", 0))
    names = {c["name"] for c in client.client_list() if c["db"] == db and c["name"].startswith("agentmesh-")}
    return sum(queue in name.partition(":")[2].split(",") for name in names)
