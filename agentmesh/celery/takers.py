"""Which workers take from a queue now, asked of the broker: RabbitMQ counts consumers, Redis clients bear a name that says it."""

import contextlib
import uuid
from collections.abc import Sequence
from typing import Any

import amqp
from celery import Celery
from redis.exceptions import RedisError

from agentmesh.celery.links import BROKEN
from agentmesh.celery.rabbit import on_rabbit, tuned

ANSWER_S = 3.0


def client_name(queues: Sequence[str]) -> str:
    """A name for the Redis connections of a worker of these broker queues, and no other's."""
    return f"agentmesh-{uuid.uuid4().hex}:{','.join(queues)}"


def takers(app: Celery, queue: str) -> int | None:
    """How many workers take from this broker queue; None where the broker is away or does not tell."""
    try:
        with app.connection_for_read(connect_timeout=ANSWER_S) as connection:
            if on_rabbit(app):
                return _consumers(tuned(connection), queue)
            connection.ensure_connection(max_retries=1, timeout=ANSWER_S)
            client = getattr(connection.default_channel, "client", None)
            return None if client is None else _named(client, queue)
    except (*BROKEN, RedisError):  # RedisError: no right to list clients, too
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
