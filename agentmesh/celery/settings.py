"""The Celery settings of an app that agentmesh makes itself; an app that is given keeps its own."""

from typing import Any

_REDIS = ("redis", "rediss", "valkey", "valkeys")
_AMQP = ("amqp", "amqps", "pyamqp", "librabbitmq")


def is_redis(broker_url: str) -> bool:
    """Whether the broker is Redis or Valkey, over TCP, TLS or a unix socket."""
    return broker_url.partition(":")[0].partition("+")[0] in _REDIS


def is_amqp(broker_url: str) -> bool:
    """Whether the broker is RabbitMQ or speaks its protocol."""
    return broker_url.partition(":")[0].partition("+")[0] in _AMQP


def settings(broker_url: str) -> dict[str, Any]:
    """What our own app is configured with: JSON only, late and local acks, nothing hijacked, retries for ever.

    Gossip, mingle and heartbeat are no settings: whoever makes a worker passes without_gossip, without_mingle and
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
        "task_acks_late": True,  # an early ack lets one worker take the whole queue
        "task_reject_on_worker_lost": False,  # the journal sends again what a dead worker held
        "worker_prefetch_multiplier": 1,
        "worker_disable_rate_limits": True,  # Celery's are per worker; a queue's rate is the journal's
        "worker_cancel_long_running_tasks_on_connection_loss": False,  # a lost connection must not throw calls away
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_detect_quorum_queues": True,
    }


def transport_options(broker_url: str) -> dict[str, Any]:
    """The connection's options: no ack emulation on Redis, where leases do that work; confirms on AMQP."""
    if is_redis(broker_url):
        return {"ack_emulation": False, "socket_keepalive": True}
    if is_amqp(broker_url):
        return {"confirm_publish": True}  # off by default: a publish would return before the broker has the message
    return {}
