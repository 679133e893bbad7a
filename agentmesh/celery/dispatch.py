"""Renders the messages of steps through Celery's own send path; sends none.

Where a rendered message is sent: in the journal's script (`send` in journal/lua/common.lua) when broker and journal are
one server and database, else in celery/publisher.py.
"""

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import celery
from celery import Celery, Signature

from agentmesh.engine.dispatch import MessageSpec
from agentmesh.journal.types import GatherPlan, TaskMessage

STEP, ADVANCE, FINISH = "agentmesh.step", "agentmesh.advance", "agentmesh.finish"  # the tasks' names
TAG = "@TAG@"  # where the journal's script puts the delivery tag


class _BufferConnection:
    """What Celery's send path needs of a producer's connection."""

    recoverable_connection_errors: tuple[type[Exception], ...] = ()
    recoverable_channel_errors: tuple[type[Exception], ...] = ()
    transport = None

    def _reraise_as_library_errors(self) -> nullcontext[None]:
        return nullcontext()


class BufferProducer:
    """A producer that sends nothing: `out` has each message as kombu's Redis transport would store it."""

    connection = _BufferConnection()
    channel = None

    def __init__(self) -> None:
        self.out: list[str] = []

    def publish(
        self, body: Any, exchange: Any = "", routing_key: str = "", headers: dict[str, Any] | None = None,
        correlation_id: str = "", reply_to: str = "", priority: int | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Append the message's text to `out`."""
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
    """A gather as Celery sees it: a chord whose header are the steps, and whose body is the advance of the run.

    Its members have group id and index, but not the `chord` option: no result backend counts them, because the journal
    does (docs/decisions/0002-the-join-is-in-the-journal.md).
    """

    def rendered(self, group_id: str, index: int) -> list[str]:
        """The header's messages; nothing is sent.

        Args:
            index: of the first member; the others follow.
        """
        buffer = BufferProducer()
        members: list[Signature] = list(self.tasks)
        for i, member in enumerate(members):
            task_id = member.options.get("task_id")
            member.freeze(_id=task_id, group_id=group_id, group_index=index + i)
            member.options.pop("chord", None)
            member.apply_async(producer=buffer, add_to_parent=False)
        return buffer.out


# ---- Templates: each kind of message is rendered by Celery once ---------------------------------

# A prefork pool kills a process this long after the tool's own timeout: before that the step should end as StepTimeout.
KILL_GRACE_S = 10.0
# Placeholders that Celery does not change; each is replaced when a message is made.
UNIT, RUN, ROOT, PARENT, GROUP, N, INDEX = "@UNIT@", "@RUN@", "@ROOT@", "@PARENT@", "@GROUP@", "@N@", 918273645
SPLIT = re.compile(f"({UNIT}|{RUN}|{ROOT}|{PARENT}|{GROUP}|{N}|{INDEX}|{TAG})")


class MessageTemplate:
    """A rendered message, cut at its placeholders."""

    __slots__ = ("_parts", "queue")

    def __init__(self, queue: str, text: str) -> None:
        self.queue = queue
        self._parts = SPLIT.split(text)

    def render(self, names: dict[str, str]) -> TaskMessage:
        """The message with these values for its placeholders."""
        text = "".join([names.get(part, part) for part in self._parts])
        head, _, tail = text.partition(TAG)
        return TaskMessage(self.queue, head, tail)


class CeleryDispatch:
    """The `Dispatch` of one crew on one Celery app.

    Celery applies its routes, stamps, signals and protocol when a kind of message is first rendered. The messages are
    sent by `send` in journal/lua/common.lua, or where the broker is another server by celery/publisher.py.
    """

    def __init__(self, app: Celery, crew: str) -> None:
        self._app, self._crew = app, crew
        self._templates: dict[tuple[str | float | None, ...], MessageTemplate] = {}

    def steps(
        self, run_id: str, members: Sequence[MessageSpec], gather: GatherPlan | None, queue: str
    ) -> list[TaskMessage]:
        """See Dispatch."""
        group = f"{run_id}:g{gather.first}" if gather else ""
        messages = []
        for i, m in enumerate(members):
            child = f"{run_id}/{m.n}"
            is_child = m.lane == "child"
            task = ADVANCE if is_child else STEP
            template = self._template(task, m.kind, m.name, m.queue, "group" if gather else "", queue, m.timeout_s)
            names = self._names(child if is_child else run_id, "a" if is_child else str(m.n))
            if gather:
                names |= {GROUP: group, str(INDEX): str(i)}
            messages.append(template.render(names))
        return messages

    def advance(self, run_id: str, agent: str, queue: str) -> TaskMessage:
        """See Dispatch."""
        return self._template(ADVANCE, "Advance", agent, queue, "", queue).render(self._names(run_id, "a"))

    def finish(self, run_id: str, agent: str, queue: str) -> TaskMessage:
        """See Dispatch."""
        return self._template(FINISH, "Finish", agent, queue, "", queue).render(self._names(run_id, "f"))

    def _names(self, run_id: str, n: str) -> dict[str, str]:
        parent, _, n_of_parent = run_id.rpartition("/")
        return {
            UNIT: f"{run_id}:{n}", RUN: run_id, N: n, ROOT: run_id.partition("/")[0],
            PARENT: f"{parent}:{n_of_parent}" if parent else run_id,
        }  # fmt: skip

    def _template(
        self,
        task: str,
        kind: str,
        name: str,
        queue: str,
        gathered: str,
        advance_queue: str,
        timeout_s: float | None = None,
    ) -> MessageTemplate:
        key = (task, kind, name, queue, gathered, timeout_s)
        if key not in self._templates:
            signature = self._signature(task, kind, name, queue)
            if timeout_s is not None:
                signature.set(time_limit=timeout_s + KILL_GRACE_S)
            if gathered:
                body = self._signature(ADVANCE, "Advance", name, advance_queue)
                text = Gather([signature], body).rendered(GROUP, INDEX)[0]
            else:
                buffer = BufferProducer()
                signature.apply_async(producer=buffer, add_to_parent=False)
                text = buffer.out[0]
            self._templates[key] = MessageTemplate(queue, text)
        return self._templates[key]

    def _signature(self, task: str, kind: str, name: str, queue: str) -> Any:
        args: tuple[str, ...] = (self._crew, RUN)
        label = RUN
        if task == STEP:
            args, label = (self._crew, RUN, N, kind, queue.rpartition(".")[2]), f"{RUN} step {N}"
        return self._app.tasks[task].si(*args).set(
            queue=queue, task_id=UNIT, root_id=ROOT, parent_id=PARENT, shadow=f"{name}.{kind.lower()}",
            argsrepr=label, kwargsrepr="", ignore_result=True,
        )  # fmt: skip
