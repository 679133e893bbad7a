"""The Celery app: given, or made here; its broker's queues counted, its foreign parts told from ours."""

import contextlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu.exceptions import ChannelError, OperationalError

from agentmesh.celery.links import BROKEN
from agentmesh.celery.rabbit import declare, on_rabbit, tuned
from agentmesh.celery.settings import is_redis, settings
from agentmesh.errors import ConfigError, ServiceDown

LOOK_S = 2.0  # how long a look at a queue may take


def make_app(broker: str) -> Celery:
    """An app of our own; it becomes nobody's current or default app."""
    app = Celery("agentmesh", set_as_current=False)
    app.conf.update(settings(broker))
    return app


def same_server(broker: str, journal: str) -> bool:
    """Whether broker and journal are one server and database, so that one script can write both."""
    return is_redis(broker) and _place(broker) == _place(journal)


def _place(url: str) -> tuple[Any, ...]:
    parts = urlsplit(url.replace("redis+socket://", "unix://"))
    if parts.scheme == "unix":
        db = dict(p.split("=", 1) for p in parts.query.split("&") if "=" in p)
        return "unix", parts.path, db.get("virtual_host", db.get("db", "0"))
    return "tcp", parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"


def journal_url(broker: str, journal: str) -> str:
    """Where the journal lives.

    Raises:
        ConfigError: the broker is no Redis and no journal is named.
    """
    if journal:
        return journal
    if not is_redis(broker):
        raise ConfigError(
            f"the broker {_shown(broker)} cannot hold the journal: set `journal` to a Redis or Valkey URL (AGENTMESH_JOURNAL=redis://…)"
        )
    return broker


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
            f"no broker answers at {_shown(url)} ({e.__cause__ or e}). Start one, or leave `broker` empty to use the embedded one"
        ) from None
    if policy != "noeviction":
        raise ConfigError(
            f"the broker at {_shown(url)} has maxmemory-policy {policy!r} and would drop messages and journals when memory is short: "
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
                self._connection = _impatient(self._app.connection_for_read())
            if on_rabbit(self._app):
                return declare(tuned(self._connection), queues)
            return {q: _length(self._connection.default_channel, q) for q in queues}
        except Exception as e:
            broken = self._connection.connection_errors if self._connection is not None else ()
            self.close()  # nothing is known of its queues
            if not isinstance(e, (*BROKEN, *broken)):  # redis-py's errors are no OSErrors
                raise
            return {}

    def close(self) -> None:
        """Give back the connection; the next count makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):  # it may be what failed
                connection.collect(socket_timeout=1.0)


def _impatient(connection: Any) -> Any:
    """A connection that gives a Redis server up which does not answer: whoever waits for it has leases to renew."""
    if connection.get_transport_cls().driver_type == "redis":
        options = {"socket_timeout": LOOK_S, "socket_connect_timeout": LOOK_S}
        connection.transport_options = {**(connection.transport_options or {}), **options}
    return connection


def _length(channel: Any, queue: str) -> int:
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError:
        return 0  # Redis keeps no empty list


def _shown(url: str) -> str:
    """A URL without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url
