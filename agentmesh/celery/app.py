"""The Celery app: given, or made here; its broker's queues counted, its foreign parts told from ours."""

from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from kombu.exceptions import ChannelError, OperationalError

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


def queue_lengths(app: Celery) -> Callable[[Sequence[str]], dict[str, int]]:
    """A function that counts the messages waiting in broker queues, over a connection it keeps."""
    kept: list[Any] = []

    def lengths(queues: Sequence[str]) -> dict[str, int]:
        try:
            if not kept:
                kept.append(app.connection_for_read())
                if (
                    kept[0].get_transport_cls().driver_type == "redis"
                ):  # which would wait for ever for a reply that got lost
                    options = {"socket_timeout": LOOK_S, "socket_connect_timeout": LOOK_S}
                    kept[0].transport_options = {**(kept[0].transport_options or {}), **options}
            return {q: _length(kept[0].default_channel, q) for q in queues}
        except Exception as e:
            errors = kept[0].connection_errors if kept else ()  # redis-py's are no OSErrors
            kept.clear()  # the broker is away; nothing is known of its queues
            if not isinstance(e, (OperationalError, OSError, AttributeError, *errors)):
                raise
            return {}

    return lengths


def _length(channel: Any, queue: str) -> int:
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except ChannelError:
        return 0  # Redis keeps no empty list


def _shown(url: str) -> str:
    """A URL without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url
