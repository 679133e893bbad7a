"""Plans the steps a flow waits for. Renders nothing itself, sends nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.definitions.crew import Crew
from agentmesh.definitions.step import Approve, Call, Delegate, Sleep, Step
from agentmesh.engine.dispatch import Dispatch, MessageSpec
from agentmesh.engine.replay import Failed, Finished, History, Outcome, Waiting
from agentmesh.errors import MeshError, StepRefused, error_to_json, message_of, raised_at
from agentmesh.journal.events import Event, RunDone, RunFailed, RunStarted, StepDone, StepFailed, StepPlanned
from agentmesh.journal.types import NextSteps, RunSpec, StepPlan


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans steps of one crew's runs.

    Args:
        model: of agents that name none, in a crew that names none; it may have a queue.
    """

    crew: Crew
    dispatch: Dispatch
    model: Any = None

    def next(self, history: History, outcome: Outcome) -> NextSteps:
        """What to write after a replay; empty when everything waited for is planned already."""
        if isinstance(outcome, Waiting):
            return self._steps(history, outcome)
        end: Event = (
            RunDone(value=outcome.value)
            if isinstance(outcome, Finished)
            else RunFailed(error=_flow_error(outcome.error))
        )
        return NextSteps(end=end, up=parent_event(history, outcome))

    def _steps(self, history: History, waiting: Waiting) -> NextSteps:
        new = {n: step for n, step in waiting.steps.items() if n not in history.planned}
        if not new:
            return NextSteps()
        members = [
            MessageSpec(
                n,
                s.kind,
                s.name,
                self.crew.queues.broker_name(self._queue(s)),
                s.tool.timeout_s if isinstance(s, Call) else None,
            )
            for n, s in new.items()
        ]
        home = self.crew.queues.broker_name(self.crew.queues.first)
        wires = dict(zip(new, self.dispatch.steps(history.run_id, members, waiting.gather, home), strict=True))
        first = waiting.gather.first if waiting.gather else 0
        plans = [self._plan(history, n, step, first, wires[n]) for n, step in new.items()]
        return NextSteps(plans, waiting.gather)

    def _queue(self, step: Step[Any]) -> str:
        if isinstance(step, Delegate | Approve | Sleep):
            return self.crew.queues.first
        return self.crew.queues.of(step, self.model)

    def _plan(self, history: History, n: int, step: Step[Any], first: int, wire: Any) -> StepPlan:
        detail = step.detail() if isinstance(step, Approve) or (isinstance(step, Call) and step.tool.approve) else None
        planned = StepPlanned(
            n=n,
            kind=step.kind,
            name=step.name,
            digest=step.digest(),
            queue=self._queue(step),
            gather=first,
            detail=detail,
        )
        if isinstance(step, Sleep):
            return StepPlan(planned, "due", wire, due_in_ms=math.ceil(step.seconds * 1000))
        if isinstance(step, Approve):
            return StepPlan(planned, "held", wire, held="approve")
        if isinstance(step, Delegate):
            return self._child(history, planned, step, wire)
        if isinstance(step, Call):
            tool = step.tool
            once, reconcile = tool.delivery == "at_most_once", tool.reconcile is not None
            if tool.approve:
                return StepPlan(planned, "held", wire, once=once, reconcile=reconcile, held="approve")
            return StepPlan(planned, "queued", wire, once=once, reconcile=reconcile)
        return StepPlan(planned, "queued", wire)

    def _child(self, history: History, planned: StepPlanned, step: Delegate[Any], wire: Any) -> StepPlan:
        started = history.started
        assert started is not None
        self.crew._register_delegate(step.agent)
        depth = history.run_id.count("/") + 1
        allowed = started.limits.get("depth", self.crew.limits.depth)
        if depth >= allowed:
            why = StepRefused(
                f"`{step.name}` would run {depth + 1} agents deep, and the limit is {allowed}: an agent that calls itself "
                "needs an end, or the crew Limits(depth=…)"
            )
            return StepPlan(planned, "ended", wire, end=StepFailed(n=planned.n, error=error_to_json(why)))
        spec = RunSpec(
            f"{history.run_id}/{planned.n}", self.crew.name, started.version, step.name, step.task,
            step.agent._fields_json(), (), history.run_id, planned.n, started.limits, wire, origin=started.origin, stream=started.stream,
            trace=started.trace,
        )  # fmt: skip
        return StepPlan(planned, "child", child=spec)


def parent_event(history: History, outcome: Outcome) -> Event | None:
    """What a child's end tells its parent."""
    started = history.started
    if started is None or not started.parent:
        return None
    if isinstance(outcome, Finished):
        return StepDone(n=started.parent_n, value=outcome.value)
    assert isinstance(outcome, Failed)
    error = {
        "type": "DelegateFailed",
        "message": f"`{started.agent}` failed: {message_of(_flow_error(outcome.error))}",
        "child": history.run_id,
    }
    return StepFailed(n=started.parent_n, error=error)


def _flow_error(error: Exception) -> dict[str, Any]:
    """An exception of a flow as the journal keeps it: what a person wrote with its place in the code."""
    error_json = error_to_json(error)
    if not isinstance(error, MeshError) and (at := raised_at(error)):
        error_json["at"] = at
    return error_json


def provisional_history(spec: RunSpec, events: Sequence[Event] = ()) -> History:
    """The history of a run that is about to begin, before the store has said when."""
    started = RunStarted(
        crew=spec.crew, version=spec.version, agent=spec.agent, task=spec.task, fields=spec.fields,
        history=list(spec.history), limits=spec.limits, origin=spec.origin, stream=spec.stream,
        trace=spec.trace,
    )  # fmt: skip
    return History(spec.id, [started, *events])
