"""Retry of a finished run: which events the new run keeps, and which steps it repeats. Starts nothing."""

from collections.abc import Sequence
from dataclasses import replace

from agentmesh.definitions.crew import Crew
from agentmesh.engine.dispatch import Dispatch
from agentmesh.engine.replay import History
from agentmesh.errors import RunError
from agentmesh.journal.events import (
    ENDS,
    Approved,
    Event,
    GatherClosed,
    LimitRaised,
    RunStarted,
    StepDone,
    StepResolved,
    Woken,
)
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import NextSteps, Refused, RetryImport, RunHead, RunSpec


def steps_to_redo(history: History) -> set[int]:
    """The steps without a good end in the last lone step or gather: what came before it, the flow has dealt with."""
    if not history.planned:
        return set()
    last = max(history.planned)
    first = history.planned[last].gather
    unit = [n for n, planned in history.planned.items() if planned.gather == first] if first else [last]
    bad = {n for n in unit if not _succeeded(history.ended.get(n))}
    closed = history.closed.get(first)
    if closed is None:
        return bad
    if closed.why == "need":
        return set()
    return bad or set(unit) - set(closed.members)  # all good, but some came after the deadline: those decide again


def _succeeded(end: Event | None) -> bool:
    return isinstance(end, StepDone | Woken | Approved) or (isinstance(end, StepResolved) and end.action == "done")


def retained_events(old: str, new: str, events: Sequence[Event], started: RunStarted) -> tuple[RetryImport, list[int]]:
    """What run `new` begins with of the journal of `old`, after its own `started`; and the Delegates it does anew."""
    history = History(old, events)
    redo = steps_to_redo(history)
    reopened = {history.planned[n].gather for n in redo} - {0}
    retained: list[Event] = [started]
    for event in events:
        is_dropped = isinstance(event, (RunStarted, LimitRaised, *ENDS)) or getattr(event, "n", -1) in {0, *redo}
        if not is_dropped and not (isinstance(event, GatherClosed) and event.first in reopened):
            retained.append(event)
    cut = {
        n: planned.digest
        for n, planned in history.planned.items()
        if n in redo and n not in history.ended and planned.kind == "Call"
    }
    known = sorted(set(history.planned) - redo)
    return RetryImport(old, new, retained, known, cut), [
        n for n in sorted(redo) if history.planned[n].kind == "Delegate"
    ]


async def _retained_tree(
    journal: Journal, old: str, new: str, events: Sequence[Event], started: RunStarted
) -> list[RetryImport]:
    """The run's, and those of the sub-agents that had not come to a good end."""
    top, delegates = retained_events(old, new, events, started)
    out = [top]
    for n in delegates:
        below = await journal.events(f"{old}/{n}")
        if len(below) < 2 or not isinstance(below[0], RunStarted):
            continue  # it had done nothing
        # What the planner will write when the flow asks for it again: the journal is then found to be this run's.
        begun = replace(
            below[0], parent=new, version=started.version, limits=started.limits, origin=started.origin,
            stream=started.stream, trace=started.trace,
        )  # fmt: skip
        out += await _retained_tree(journal, f"{old}/{n}", f"{new}/{n}", below, begun)
    return out


async def retry(run_id: str, *, crew: Crew, dispatch: Dispatch, journal: Journal) -> str:
    """Begin `ID~2` (then `~3`) with the facts of the newest of that line; answers the new run's id.

    Raises:
        RunError: there is no such run, it is open or done, it is a sub-agent's, or another crew's.
    """
    last = await latest_retry(journal, run_id)
    old = last.id
    _check_retryable(last, crew)
    first, _, k = old.partition("~")
    new = f"{first}~{int(k or 1) + 1}"
    events = await journal.events(old)
    was = events[0]
    assert isinstance(was, RunStarted)
    crew.agent(was.agent, was.fields)
    started = replace(was, version=crew.version, limits=crew.limits.to_json(), canvas=None)
    spec = RunSpec(
        new, crew.name, crew.version, was.agent, was.task, was.fields, was.history, limits=started.limits,
        wire=dispatch.advance(new, was.agent, crew.queues.broker_name(crew.queues.first)), origin=was.origin, stream=was.stream,
        trace=was.trace,
    )  # fmt: skip
    answer = await journal.begin(spec, NextSteps(), await _retained_tree(journal, old, new, events, started))
    if isinstance(answer, Refused):
        raise RunError(f"run {new} exists with another agent or task", run_id=new)
    return new


async def latest_retry(journal: Journal, run_id: str) -> RunHead:
    """The run, or the last retry of it that there is."""
    head = await journal.head(run_id)
    if head is None:
        raise RunError(f"there is no run {run_id!r}", hint="`agentmesh runs ls` lists them", run_id=run_id)
    if "/" in run_id:
        root = run_id.partition("/")[0]
        raise RunError(
            f"run {run_id} is a sub-agent's", hint=f"retry the root run: agentmesh runs retry {root}", run_id=run_id
        )
    first, _, k = run_id.partition("~")
    count = int(k or 1)
    while (later := await journal.head(f"{first}~{count + 1}")) is not None:
        head, count = later, count + 1
    return head


def _check_retryable(head: RunHead, crew: Crew) -> None:
    run_id = head.id
    if head.status == "open":
        raise RunError(
            f"run {run_id} is still open, and only a finished run can be retried",
            hint="continue it with `agentmesh runs resume "
            f"{run_id}`, a held step with `agentmesh runs resolve {run_id} N retry|failed|done`, or end it with "
            f"`agentmesh runs cancel {run_id}`",
            run_id=run_id,
        )
    if head.status == "done":
        raise RunError(f"run {run_id} is done", hint="there is nothing to retry", run_id=run_id)
    if head.crew != crew.name:
        raise RunError(
            f"run {run_id} is of crew {head.crew!r} and this is crew {crew.name!r}: name its file", run_id=run_id
        )
