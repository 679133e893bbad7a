"""Renders messages through Celery's own send path, once a kind; after that a message is a string with its names put in."""

import re
from collections.abc import Sequence
from typing import Any

from celery import Celery

from agentmesh.celery.gather import TAG, Buffer, Gather
from agentmesh.ports import GatherPlan, Member, Wire

# A pool that can kill does so this long after a tool's own timeout: by then the step should have ended as StepTimeout.
KILL_S = 10.0
# Placeholders that Celery carries through unharmed; each is replaced when a message is made.
UNIT, RUN, ROOT, PARENT, GROUP, N, INDEX = "@UNIT@", "@RUN@", "@ROOT@", "@PARENT@", "@GROUP@", "@N@", 918273645
SPLIT = re.compile(f"({UNIT}|{RUN}|{ROOT}|{PARENT}|{GROUP}|{N}|{INDEX}|{TAG})")


class Template:
    """A rendered message, cut at its placeholders."""

    __slots__ = ("_parts", "queue")

    def __init__(self, queue: str, text: str) -> None:
        self.queue = queue
        self._parts = SPLIT.split(text)

    def wire(self, names: dict[str, str]) -> Wire:
        """The message with these names in it."""
        text = "".join([names.get(part, part) for part in self._parts])
        head, _, tail = text.partition(TAG)
        return Wire(self.queue, head, tail)


class CeleryDispatch:
    """Messages for the tasks of one crew on one Celery app.

    Routes, stamps, signals and the protocol are Celery's, applied when a kind of message is first rendered.
    """

    def __init__(self, app: Celery, crew: str) -> None:
        self._app, self._crew = app, crew
        self._templates: dict[tuple[str | float | None, ...], Template] = {}

    def steps(self, run_id: str, members: Sequence[Member], gather: GatherPlan | None, queue: str) -> list[Wire]:
        """See ports.Dispatch."""
        group = f"{run_id}:g{gather.first}" if gather else ""
        wires = []
        for i, m in enumerate(members):
            template = self._template(m.kind, m.name, m.queue, "group" if gather else "", queue, m.timeout_s)
            child = f"{run_id}/{m.n}"
            of_child = m.kind == "Delegate"
            names = self._names(child if of_child else run_id, "a" if of_child else str(m.n))
            if gather:
                names |= {GROUP: group, str(INDEX): str(i)}
            wires.append(template.wire(names))
        return wires

    def advance(self, run_id: str, agent: str, queue: str) -> Wire:
        """See ports.Dispatch."""
        return self._template("Advance", agent, queue, "", queue).wire(self._names(run_id, "a"))

    def finish(self, run_id: str, agent: str, queue: str) -> Wire:
        """See ports.Dispatch."""
        return self._template("Finish", agent, queue, "", queue).wire(self._names(run_id, "f"))

    def _names(self, run_id: str, n: str) -> dict[str, str]:
        parent, _, of = run_id.rpartition("/")
        return {
            UNIT: f"{run_id}:{n}", RUN: run_id, N: n, ROOT: run_id.partition("/")[0],
            PARENT: f"{parent}:{of}" if parent else run_id,
        }  # fmt: skip

    def _template(
        self, kind: str, name: str, queue: str, gathered: str, home: str, timeout_s: float | None = None
    ) -> Template:
        key = (kind, name, queue, gathered, timeout_s)
        if key not in self._templates:
            signature = self._signature(kind, name, queue)
            if timeout_s is not None:
                signature.set(time_limit=timeout_s + KILL_S)
            if gathered:
                body = self._signature("Advance", name, home)
                text = Gather([signature], body).rendered(GROUP, INDEX)[0]
            else:
                buffer = Buffer()
                signature.apply_async(producer=buffer, add_to_parent=False)
                text = buffer.out[0]
            self._templates[key] = Template(queue, text)
        return self._templates[key]

    def _signature(self, kind: str, name: str, queue: str) -> Any:
        args: tuple[str, ...]
        task, args = "agentmesh.step", (self._crew, RUN, N, kind, queue.rpartition(".")[2])
        shown = f"{RUN} step {N}"
        if kind in ("Advance", "Delegate"):
            task, args, shown = "agentmesh.advance", (self._crew, RUN), RUN
        elif kind == "Finish":
            task, args, shown = "agentmesh.finish", (self._crew, RUN), RUN
        return self._app.tasks[task].si(*args).set(
            queue=queue, task_id=UNIT, root_id=ROOT, parent_id=PARENT, shadow=f"{name}.{kind.lower()}",
            argsrepr=shown, kwargsrepr="", ignore_result=True,
        )  # fmt: skip
