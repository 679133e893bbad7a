"""replay(flow, events) -> Finished | Failed | Waiting: a flow run over what its journal holds. Pure: no clock, no I/O."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.step import RUNNING_INSIDE, Step
from agentmesh.errors import ApprovalDenied, QuorumMissed, ReplayError, StepError, error_from_json
from agentmesh.journal.events import (
    ENDS,
    Approved,
    Denied,
    Event,
    GatherClosed,
    RunStarted,
    StepDone,
    StepFailed,
    StepPlanned,
    StepResolved,
    StepRetried,
    Woken,
)
from agentmesh.journal.types import GatherPlan
from agentmesh.message import Message
from agentmesh.schema import dumps, from_json, to_json

EVENT_BYTES = 600  # an event's object and its strings, beside the text of its line


class History:
    """A run's events, sorted for replay; only ever appended to."""

    def __init__(self, run_id: str, events: Iterable[Event] = ()) -> None:
        self.run_id = run_id
        self.version = 0
        self.started: RunStarted | None = None
        self.planned: dict[int, StepPlanned] = {}
        self.ended: dict[int, Event] = {}
        self.closed: dict[int, GatherClosed] = {}
        self.away: dict[int, list[int]] = {}  # ms that each step waited for unreachable servers, one a retry
        self.end: Event | None = None
        # What earlier replays over this history have computed: a run of n steps is replayed n times.
        self.checked: set[int] = set()
        self.values: dict[int, Any] = {}
        self._bytes, self._unweighed = 0, list[Event]()
        self.extend(events)

    def extend(self, events: Iterable[Event]) -> None:
        """Add the next facts."""
        for event in events:
            self.version += 1
            self._unweighed.append(event)
            if isinstance(event, StepPlanned):
                self.planned[event.n] = event
            elif isinstance(event, StepDone | StepFailed | Denied | Woken):
                self.ended.setdefault(event.n, event)
            elif isinstance(event, StepRetried):
                if event.away:
                    self.away.setdefault(event.n, []).append(event.after_ms)
            elif isinstance(event, GatherClosed):
                self.closed[event.first] = event
            elif isinstance(event, RunStarted):
                self.started = event
            elif (isinstance(event, Approved) and self.planned[event.n].lane == "held") or (
                isinstance(event, StepResolved) and event.action != "retry"
            ):
                self.ended.setdefault(event.n, event)
            elif isinstance(event, ENDS):
                self.end = event

    @property
    def bytes(self) -> int:
        """What its events weigh in memory, about: their lines and what surrounds their values."""
        for event in self._unweighed:  # only now: one that was added before it was written had no line yet
            self._bytes += EVENT_BYTES + (event.line_bytes or len(dumps(event.to_json())))
        self._unweighed.clear()
        return self._bytes

    def catch_up(self, events: Sequence[Event], version: int) -> None:
        """Add those of `events`, which end at `version`, that it lacks."""
        missing = version - self.version
        if missing > 0:
            self.extend(events[len(events) - missing :])


@dataclass(frozen=True, slots=True)
class Finished:
    """The flow returned; `value` is JSON."""

    value: Any
    messages: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The flow raised."""

    error: Exception
    messages: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """The flow cannot continue without these steps, planned or not. Without any: it has asked for `started_at`."""

    steps: dict[int, Step[Any]]
    gather: GatherPlan | None = None
    messages: Sequence[Message] = ()


IMMUTABLE = (Message, str, int, float, bool)

Outcome = Finished | Failed | Waiting


class Suspended(BaseException):
    """Leaves a flow that must wait. A BaseException, so that `except Exception` lets it pass."""


class ReplayContext:
    """The Context of one replay."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._n = 0
        self.waiting: Waiting | None = None
        self.broken: ReplayError | None = None
        self.messages: list[Message] = []

    @property
    def run_id(self) -> str:
        """This run's id."""
        return self._history.run_id

    @property
    def started_at(self) -> float:
        """Seconds since the epoch when the run began, by the store's clock."""
        started = self._history.started
        assert started is not None
        if not started.at_ms:
            self._suspend(Waiting({}))  # the client's first replay: the run is not begun
        return started.at_ms / 1000

    @property
    def history(self) -> list[Message]:
        """The conversation the run was started with."""
        started = self._history.started
        assert started is not None
        return [Message.from_json(m) for m in started.history]

    def do(self, step: Step[Any]) -> Any:
        """See Context."""
        self._check_not_suspended()
        _check_step(step, "do")
        n = self._step_number(step)
        if n not in self._history.ended:
            self._suspend(Waiting({n: step}))
        value = self._value(n, step)
        if isinstance(value, StepError):
            raise value
        return value

    def gather(
        self, steps: Iterable[Step[Any]], *, need: float | None = None, deadline_s: float | None = None,
        errors: bool = False, window: int = 0,
    ) -> Any:  # fmt: skip
        """See Context."""
        self._check_not_suspended()
        values = self._gather(list(steps), need, deadline_s, errors, window)
        one_for_each = errors or (need is None and deadline_s is None)
        return tuple(values) if one_for_each and isinstance(steps, tuple) else values

    def _gather(
        self, steps: list[Step[Any]], need: float | None, deadline_s: float | None, errors: bool, window: int
    ) -> list[Any]:
        for step in steps:
            _check_step(step, "gather")
        if errors and need is not None:
            raise ValueError("gather(errors=True) waits for all steps, and `need` for some of them: drop one")
        need_count = _count(need, len(steps))
        if not steps:
            return []
        if len(steps) == 1 and deadline_s is None:
            return self._lone_gather(steps[0], need is not None, errors)
        first = self._n + 1
        numbered = {self._step_number(step, first): step for step in steps}
        closed = self._history.closed.get(first)
        if closed is None:
            deadline = _deadline_ms(deadline_s)
            everyone = errors or (need is None and deadline_s is not None)
            self._suspend(Waiting(numbered, GatherPlan(first, self._n, need_count, everyone, deadline, window)))
        assert closed is not None
        values = {n: self._value(n, numbered[n]) for n in closed.members}  # the members it counted, no others
        if errors:
            late = QuorumMissed("not ended when the gather's deadline came")
            return [values.get(n, late) for n in numbered]
        failed = [values[n] for n in closed.members if isinstance(values[n], StepError)]
        good = [values[n] for n in numbered if n in values and not isinstance(values[n], StepError)]
        if need is None and deadline_s is None:
            if failed:
                raise failed[0]
            return good
        if len(good) >= (need_count if need is not None else 1):
            return good
        raise QuorumMissed(
            f"{len(good)} of {len(numbered)} members succeeded, {need_count if need is not None else 1} were needed"
            + (" before the deadline" if closed.why == "deadline" else ""),
            errors=failed,
        )

    def _lone_gather(self, step: Step[Any], tolerant: bool, errors: bool) -> list[Any]:
        """A gather of one is a lone step: no join, no body."""
        n = self._step_number(step)
        if n not in self._history.ended:
            self._suspend(Waiting({n: step}))
        value = self._value(n, step)
        if isinstance(value, StepError) and not errors:
            raise QuorumMissed("0 of 1 members succeeded, 1 was needed", errors=[value]) if tolerant else value
        return [value]

    def _step_number(self, step: Step[Any], gather: int = 0) -> int:
        """The step's number; the journal must know the same step under it, or none."""
        self._n += 1
        n = self._n
        was = self._history.planned.get(n)
        if was is None:
            return n
        is_known = n in self._history.checked  # its digest was compared before; kind and name are at every replay
        if (was.kind, was.name, was.gather) != (step.kind, step.name, gather) or (
            not is_known and was.digest != step.digest()
        ):
            self._raise_mismatch(n, f"{was.kind} {was.name!r}", f"{step.kind} {step.name!r}")
        self._history.checked.add(n)
        return n

    def _value(self, n: int, step: Step[Any]) -> Any:
        """What became of step n: its value, or its StepError."""
        cached = self._history.values.get(n)
        if cached is not None:
            return cached
        event = self._history.ended[n]
        where: dict[str, Any] = {"run_id": self.run_id, "n": n, "name": step.name}
        if isinstance(event, StepDone):
            value = step.decode(event.value)
            if type(value) in IMMUTABLE:  # anything else the flow may change: each replay gets its own
                self._history.values[n] = value
            return value
        if isinstance(event, StepResolved) and event.action == "done":
            return step.decode(event.value)
        if isinstance(event, Denied):
            reason = f": {event.reason}" if event.reason else ""
            return ApprovalDenied(
                f"{step.name} was denied{f' by {event.by}' if event.by else ''}{reason}", by=event.by, **where
            )
        if isinstance(event, StepFailed):
            error = error_from_json(event.error)
            if not isinstance(error, StepError):
                error = StepError(error.message, hint=error.hint)
            return error.with_fields(**where, attempts=event.attempt)
        if isinstance(event, StepResolved):
            return StepError(f"step {n}, {step.name}: {event.by or 'a person'} reported that it failed", **where)
        return step.decode(None)  # Approved, Woken

    def _check_not_suspended(self) -> None:
        if self.waiting or self.broken:
            raise Suspended  # the flow swallowed the first one; it must not continue

    def _suspend(self, waiting: Waiting) -> None:
        self.waiting = waiting
        raise Suspended

    def _raise_mismatch(self, n: int, was: str, now: str) -> None:
        self.broken = ReplayError(
            f"step {n} was `{was}` when first run and is now `{now}`, and a flow must ask for the same steps in the same "
            "order",
            hint="move clocks, randomness and I/O into tools, or give the crew a new version",
            run_id=self.run_id,
            n=n,
        )
        raise Suspended

    def check_all_asked(self) -> None:
        """A flow that ended must have asked for every step the journal has planned."""
        planned = self._history.planned
        if planned and (last := max(planned)) > self._n:
            try:
                self._raise_mismatch(last, f"{planned[last].kind} {planned[last].name!r}", "the end of the flow")
            except Suspended:
                return


def replay(agent: Agent[Any, Any], history: History) -> Outcome:
    """Run the agent's flow over the journal.

    Raises:
        ReplayError: the flow asks for other steps than it did.
    """
    started = history.started
    assert started is not None
    ctx = ReplayContext(history)
    token = RUNNING_INSIDE.set(f"the flow of `{agent.name}`")
    outcome: Outcome
    try:
        value = agent.flow(from_json(started.task, agent.task_type), ctx)
        outcome = Finished(to_json(value, agent.output), tuple(ctx.messages))
    except Suspended:
        outcome = Failed(RuntimeError("suspended without a reason"))
    except TypeError as e:
        outcome = Failed(TypeError(f"the flow of `{agent.name}`: {e}"), tuple(ctx.messages))
    except Exception as e:  # the flow's own: it ends the run
        outcome = Failed(e, tuple(ctx.messages))
    finally:
        RUNNING_INSIDE.reset(token)
    if ctx.waiting is None and ctx.broken is None:
        ctx.check_all_asked()
    if ctx.broken is not None:
        raise ctx.broken
    if ctx.waiting is not None:
        return Waiting(ctx.waiting.steps, ctx.waiting.gather, tuple(ctx.messages))
    return outcome


def _count(need: float | None, n: int) -> int:
    if need is None:
        return n
    if isinstance(need, float):
        if not 0 < need <= 1:
            raise ValueError(f"gather(need={need!r}): a fraction is above 0 and at most 1.0; a count is an int")
        return math.ceil(need * n)
    if not 1 <= need <= n:
        raise ValueError(f"gather(need={need!r}) of {n} steps: a count is 1 to {n}")
    return int(need)


def _deadline_ms(deadline_s: float | None) -> int:
    if deadline_s is not None and not 0 <= deadline_s < math.inf:
        raise ValueError(f"gather(deadline_s={deadline_s!r}): give seconds, 0 or more")
    return 0 if deadline_s is None else max(1, math.ceil(deadline_s * 1000))  # 0 in the journal is no deadline


def _check_step(step: Any, verb: str) -> None:
    if isinstance(step, Step):
        return
    hint = "write `.on(...)`: `Researcher().on(task)`, `forecast.on('Lima')`"
    if isinstance(step, Agent):
        hint = f"write `{step.name}().on(task)`"
    raise TypeError(f"ctx.{verb} takes steps, not {type(step).__name__}: {hint}")
