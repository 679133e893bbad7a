"""Plans new runs, the steps that a flow waits for, and the end of a run. Sends nothing."""

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.step import Step, StepPolicy
from agentmesh.engine.dispatch import Dispatch, MessageSpec
from agentmesh.engine.replay import Failed, Finished, History, Outcome, Waiting
from agentmesh.errors import DefinitionError, MeshError, StepRefused, error_to_json, message_of, raised_at
from agentmesh.journal.events import Event, RunDone, RunFailed, RunStarted, StepDone, StepFailed, StepPlanned
from agentmesh.journal.run_spec import RunSpec
from agentmesh.journal.types import NewRun, NextSteps, StepPlan, TaskMessage
from agentmesh.message import Message

RUN_ID = frozenset(string.ascii_letters + string.digits + "_.-")  # the engine's own ids also have "/" and "~"


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
        policies = {n: _policy(step) for n, step in new.items()}
        queues = {n: self._queue(step) for n, step in new.items()}
        members = [
            MessageSpec(
                n, s.kind, s.lane, s.name, self.crew.queues.broker_name(queues[n]), _kill_after_s(s, policies[n])
            )
            for n, s in new.items()
        ]
        advance_queue = self.crew.queues.broker_name(self.crew.queues.first)
        wires = dict(zip(new, self.dispatch.steps(history.run_id, members, waiting.gather, advance_queue), strict=True))
        first = waiting.gather.first if waiting.gather else 0
        plans = []
        for n, step in new.items():
            planned = StepPlanned(
                n=n, kind=step.kind, lane=step.lane, name=step.name, digest=step.digest(), queue=queues[n], gather=first,
                detail=step.describe() if policies[n].held else None,
            )  # fmt: skip
            plans.append(self._plan(history, planned, step, policies[n], wires[n]))
        return NextSteps(plans, waiting.gather)

    def _queue(self, step: Step[Any]) -> str:
        return self.crew.queues.of(step, self.model) if step.lane == "queued" else self.crew.queues.first

    def _plan(
        self, history: History, planned: StepPlanned, step: Step[Any], policy: StepPolicy, wire: TaskMessage
    ) -> StepPlan:
        if step.lane == "child":
            return self._child(history, planned, step, wire)
        if step.lane == "due":
            return StepPlan(planned, "due", wire, due_in_ms=math.ceil(policy.due_in_s * 1000))
        return StepPlan(
            planned, "held" if policy.held else "queued", wire, limited=step.target == "model", once=policy.at_most_once,
            reconcile=policy.reconcile is not None, held=policy.held,
        )  # fmt: skip

    def _child(self, history: History, planned: StepPlanned, step: Step[Any], wire: TaskMessage) -> StepPlan:
        started = history.started
        assert started is not None
        agent, task = step.child()
        self.crew._register_delegate(agent)
        depth = history.run_id.count("/") + 1
        allowed = started.limits.get("depth", self.crew.limits.depth)
        if depth >= allowed:
            why = StepRefused(
                f"`{step.name}` would run {depth + 1} agents deep, and the limit is {allowed}",
                hint="give an agent that calls itself an end, or the crew Limits(depth=…)",
            )
            return StepPlan(planned, "ended", wire, end=StepFailed(n=planned.n, error=error_to_json(why)))
        spec = started.child(
            agent=step.name, task=task, fields=agent._fields_json(), parent=history.run_id, parent_n=planned.n
        )
        return StepPlan(planned, "child", child=NewRun(f"{history.run_id}/{planned.n}", spec, wire))


def root_run(
    crew: Crew, dispatch: Dispatch, agent: Agent[Any, Any], task: Any, *, run_id: str, queue: str,
    history: Sequence[Message] = (), origin: str = "", stream: bool = False, trace: str = "",
) -> NewRun:  # fmt: skip
    """A new run of this agent that no step began.

    Raises:
        DefinitionError: the task is not of the agent's type, or the run id is malformed.
        UnknownName: the crew has no such agent.
    """
    if not 1 <= len(run_id) <= 64 or not set(run_id) <= RUN_ID:
        raise DefinitionError(f"{run_id!r} is not a run id", hint="use 1 to 64 of: letters, digits, `_`, `.`, `-`")
    crew.agent(agent.name)
    spec = RunSpec(
        crew=crew.name, version=crew.version, agent=agent.name, task=agent._task_json(task),
        fields=agent._fields_json(), history=[m.to_json() for m in history], limits=crew.limits.to_json(),
        origin=origin, stream=stream, trace=trace,
    )  # fmt: skip
    return NewRun(run_id, spec, dispatch.advance(run_id, agent.name, queue))


def _policy(step: Step[Any]) -> StepPolicy:
    """The step's; what a person ends is held, for approval unless the step says for what."""
    policy = step.policy()
    return policy._replace(held="approve") if step.lane == "held" and not policy.held else policy


def _kill_after_s(step: Step[Any], policy: StepPolicy) -> float | None:
    """The timeout of a function, which may not notice it; a model's client does."""
    return policy.timeout_s if step.lane == "queued" and step.target == "function" else None


def parent_event(history: History, outcome: Outcome) -> Event | None:
    """The end of the parent's step that the end of this run is; None of a root run."""
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
    """An exception of a flow as JSON: of the user's code, with the line that raised it."""
    error_json = error_to_json(error)
    if not isinstance(error, MeshError) and (at := raised_at(error)):
        error_json["at"] = at
    return error_json


def provisional_history(new: NewRun, events: Sequence[Event] = ()) -> History:
    """The history of a run that is not begun yet, so that its start has no time."""
    return History(new.run_id, [RunStarted.of(new.spec), *events])
