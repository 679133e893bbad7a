"""From what a flow waits for to what the journal is asked to plan; renders nothing itself, sends nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.crew import Crew
from agentmesh.errors import MeshError, StepRefused, error_to_json, raised_at, said
from agentmesh.event import Event, RunDone, RunFailed, RunStarted, StepDone, StepFailed, StepPlanned
from agentmesh.ports import Dispatch, Member, Next, Plan, RunSpec
from agentmesh.replay import Failed, Finished, History, Outcome, Waiting
from agentmesh.step import Approve, Call, Delegate, Sleep, Step


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans steps of one crew's runs.

    Args:
        model: of agents that name none, in a crew that names none; it may have a queue.
    """

    crew: Crew
    dispatch: Dispatch
    model: Any = None

    def next(self, history: History, outcome: Outcome) -> Next:
        """What to write after a replay; empty when everything waited for is planned already."""
        if isinstance(outcome, Waiting):
            return self._steps(history, outcome)
        end: Event = (
            RunDone(value=outcome.value) if isinstance(outcome, Finished) else RunFailed(error=_told(outcome.error))
        )
        return Next(end=end, up=upward(history, outcome))

    def _steps(self, history: History, waiting: Waiting) -> Next:
        new = {n: step for n, step in waiting.steps.items() if n not in history.planned}
        if not new:
            return Next()
        members = [
            Member(
                n,
                s.kind,
                s.name,
                self.crew.broker_queue(self._queue(s)),
                s.tool.timeout_s if isinstance(s, Call) else None,
            )
            for n, s in new.items()
        ]
        home = self.crew.broker_queue(self.crew.queue)
        wires = dict(zip(new, self.dispatch.steps(history.run_id, members, waiting.gather, home), strict=True))
        first = waiting.gather.first if waiting.gather else 0
        plans = [self._plan(history, n, step, first, wires[n]) for n, step in new.items()]
        return Next(plans, waiting.gather)

    def _queue(self, step: Step[Any]) -> str:
        if isinstance(step, Delegate | Approve | Sleep):
            return self.crew.queue
        return self.crew.queue_of(step, self.model)

    def _plan(self, history: History, n: int, step: Step[Any], first: int, wire: Any) -> Plan:
        shown = step.detail() if isinstance(step, Approve) or (isinstance(step, Call) and step.tool.approve) else None
        planned = StepPlanned(
            n=n,
            kind=step.kind,
            name=step.name,
            digest=step.digest(),
            queue=self._queue(step),
            gather=first,
            detail=shown,
        )
        if isinstance(step, Sleep):
            return Plan(planned, "due", wire, due_in_ms=math.ceil(step.seconds * 1000))
        if isinstance(step, Approve):
            return Plan(planned, "held", wire, held="approve")
        if isinstance(step, Delegate):
            return self._child(history, planned, step, wire)
        if isinstance(step, Call):
            tool = step.tool
            once, reconcile = tool.delivery == "at_most_once", tool.reconcile is not None
            if tool.approve:
                return Plan(planned, "held", wire, once=once, reconcile=reconcile, held="approve")
            return Plan(planned, "queued", wire, once=once, reconcile=reconcile)
        return Plan(planned, "queued", wire)

    def _child(self, history: History, planned: StepPlanned, step: Delegate[Any], wire: Any) -> Plan:
        started = history.started
        assert started is not None
        self.crew.meet(step.agent)
        depth = history.run_id.count("/") + 1
        allowed = started.limits.get("depth", self.crew.limits.depth)
        if depth >= allowed:
            why = StepRefused(
                f"`{step.name}` would run {depth + 1} agents deep, and the limit is {allowed}: an agent that calls itself "
                "needs an end, or the crew Limits(depth=…)"
            )
            return Plan(planned, "ended", wire, end=StepFailed(n=planned.n, error=error_to_json(why)))
        spec = RunSpec(
            f"{history.run_id}/{planned.n}", self.crew.name, started.version, step.name, step.task,
            step.agent.fields_json(), (), history.run_id, planned.n, started.limits, wire, origin=started.origin, stream=started.stream,
            trace=started.trace,
        )  # fmt: skip
        return Plan(planned, "child", child=spec)


def upward(history: History, outcome: Outcome) -> Event | None:
    """What a child's end tells its parent."""
    started = history.started
    if started is None or not started.parent:
        return None
    if isinstance(outcome, Finished):
        return StepDone(n=started.parent_n, value=outcome.value)
    assert isinstance(outcome, Failed)
    error = {
        "type": "DelegateFailed",
        "message": f"`{started.agent}` failed: {said(_told(outcome.error))}",
        "child": history.run_id,
    }
    return StepFailed(n=started.parent_n, error=error)


def _told(error: Exception) -> dict[str, Any]:
    """An exception of a flow as the journal keeps it: what a person wrote with its place in the code."""
    told = error_to_json(error)
    if not isinstance(error, MeshError) and (at := raised_at(error)):
        told["at"] = at
    return told


def assumed(spec: RunSpec, events: Sequence[Event] = ()) -> History:
    """The history of a run that is about to begin, before the store has said when."""
    started = RunStarted(
        crew=spec.crew, version=spec.version, agent=spec.agent, task=spec.task, fields=spec.fields,
        history=list(spec.history), limits=spec.limits, origin=spec.origin, stream=spec.stream,
        trace=spec.trace,
    )  # fmt: skip
    return History(spec.id, [started, *events])
