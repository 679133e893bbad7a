"""A gather as Celery sees it: a chord, frozen and rendered by Celery's send path, joined by the journal alone."""

import json
from contextlib import nullcontext
from typing import Any

import celery
from celery import Signature

TAG = "@TAG@"  # where the store puts the delivery tag


class _Connection:
    """What Celery's send path asks of a producer's connection when it guards a publish."""

    recoverable_connection_errors: tuple[type[Exception], ...] = ()
    recoverable_channel_errors: tuple[type[Exception], ...] = ()
    transport = None

    def _reraise_as_library_errors(self) -> nullcontext[None]:
        return nullcontext()


class Buffer:
    """A producer that renders and sends nothing: `out` has each message as kombu's Redis transport would store it."""

    connection = _Connection()
    channel = None

    def __init__(self) -> None:
        self.out: list[str] = []

    def publish(
        self, body: Any, exchange: Any = "", routing_key: str = "", headers: dict[str, Any] | None = None,
        correlation_id: str = "", reply_to: str = "", priority: int | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Keep the message's text."""
        name = exchange if isinstance(exchange, str) else getattr(exchange, "name", "")
        properties = {
            "correlation_id": correlation_id,
            "reply_to": reply_to,
            "delivery_mode": 2,
            "priority": priority or 0,
            "delivery_info": {"exchange": name or "", "routing_key": routing_key},
            "delivery_tag": TAG,
        }
        message = {
            "body": json.dumps(body, separators=(",", ":")),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers or {},
            "properties": properties,
        }
        self.out.append(json.dumps(message, separators=(",", ":")))


class Gather(celery.chord):  # type: ignore[misc]  # celery is untyped
    """A chord whose header and body are a gather's steps and its advance.

    Its members carry group id and index, but not the `chord` option: no result backend counts anything, because the
    count is the journal's (docs/decisions/join.md).
    """

    def rendered(self, group_id: str, index: int) -> list[str]:
        """The header's messages; nothing is sent.

        Args:
            index: of the first member; the others follow.
        """
        buffer = Buffer()
        members: list[Signature] = list(self.tasks)
        for i, member in enumerate(members):
            task_id = member.options.get("task_id")
            member.freeze(_id=task_id, group_id=group_id, group_index=index + i)
            member.options.pop("chord", None)
            member.apply_async(producer=buffer, add_to_parent=False)
        return buffer.out
