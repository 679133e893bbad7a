"""The Celery app that agentmesh makes itself, and its settings; an app of the user keeps its own."""

from typing import Any
from urllib.parse import urlsplit

from celery import Celery

from agentmesh.errors import ConfigError

_REDIS_SCHEMES = ("redis", "rediss", "valkey", "valkeys")
_AMQP_SCHEMES = ("amqp", "amqps", "pyamqp", "librabbitmq")


def is_redis(broker_url: str) -> bool:
    """Whether the broker is Redis or Valkey, over TCP, TLS or a unix socket."""
    return broker_url.partition(":")[0].partition("+")[0] in _REDIS_SCHEMES


def is_amqp(broker_url: str) -> bool:
    """Whether the broker is RabbitMQ or speaks its protocol."""
    return broker_url.partition(":")[0].partition("+")[0] in _AMQP_SCHEMES


def celery_settings(broker_url: str) -> dict[str, Any]:
    """The settings of our own app: JSON only, late and local acks, nothing hijacked, endless reconnects.

    Gossip, mingle and heartbeat are not settings: the code that makes a worker passes without_gossip, without_mingle and
    without_heartbeat.
    """
    return {
        "broker_url": broker_url,
        "broker_transport_options": transport_options(broker_url),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "task_ignore_result": True,
        "task_acks_late": True,  # with early acks one worker would take the whole queue
        "task_reject_on_worker_lost": False,  # the journal re-sends what a dead worker held
        "worker_prefetch_multiplier": 1,
        "worker_disable_rate_limits": True,  # Celery's are per worker; a queue's rate is the journal's
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # a lost connection must not cancel running calls
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_detect_quorum_queues": True,
    }


def transport_options(broker_url: str) -> dict[str, Any]:
    """The connection's options: no ack emulation on Redis, where leases replace it; confirms on AMQP."""
    if is_redis(broker_url):
        return {"ack_emulation": False, "socket_keepalive": True}
    if is_amqp(broker_url):
        return {"confirm_publish": True}  # off by default, where a publish returns before the broker has the message
    return {}


# ---- The Celery app -----------------------------------------------------------------------------


def make_app(broker: str) -> Celery:
    """An app of our own; it does not become the current or the default app."""
    app = Celery("agentmesh", set_as_current=False)
    app.conf.update(celery_settings(broker))
    return app


def same_server(broker: str, journal: str) -> bool:
    """Whether broker and journal are one server and database, so that one script can write both."""
    return is_redis(broker) and _server_of(broker) == _server_of(journal)


def _server_of(url: str) -> tuple[Any, ...]:
    parts = urlsplit(url.replace("redis+socket://", "unix://"))
    if parts.scheme == "unix":
        db = dict(p.split("=", 1) for p in parts.query.split("&") if "=" in p)
        return "unix", parts.path, db.get("virtual_host", db.get("db", "0"))
    return "tcp", parts.hostname, parts.port or 6379, parts.path.strip("/") or "0"


def journal_url(broker: str, journal: str) -> str:
    """Where the journal lives.

    Raises:
        ConfigError: the broker is not Redis and no journal is set.
    """
    if journal:
        return journal
    if not broker:
        raise ConfigError(
            "no broker is named",
            hint="set AGENTMESH_BROKER or pass `broker=`; only `run()` and the commands start a server",
        )
    if not is_redis(broker):
        raise ConfigError(
            f"the broker {without_password(broker)} cannot hold the journal",
            hint="set `journal` to a Redis or Valkey URL (AGENTMESH_JOURNAL=redis://…)",
        )
    return broker


def without_password(url: str) -> str:
    """A URL without its password."""
    parts = urlsplit(url)
    return url.replace(f":{parts.password}@", ":***@") if parts.password else url
