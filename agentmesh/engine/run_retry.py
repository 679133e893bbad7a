"""Retry of a finished run: which events the new run keeps, and which steps it repeats. Executes nothing."""

from collections.abc import Sequence

from agentmesh.definitions.crew import Crew
from agentmesh.engine.dispatch import Dispatch
from agentmesh.engine.replay import History
from agentmesh.engine.run_errors import unknown_run
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
from agentmesh.journal.types import NewRun, NextSteps, Refused, RetryImport, RunHead


def steps_to_redo(history: History) -> set[int]:
    """The steps that have not succeeded in the last lone step or gather; the flow has handled what came before."""
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
    return bad or set(unit) - set(closed.members)  # all succeeded, but some after the deadline: those are redone


def _succeeded(end: Event | None) -> bool:
    return isinstance(end, StepDone | Woken | Approved) or (isinstance(end, StepResolved) and end.action == "done")


def retained_events(old: str, new: str, events: Sequence[Event], started: RunStarted) -> tuple[RetryImport, list[int]]:
    """What run `new` begins with of the journal of `old`, after its own `started`; and the steps with child runs to redo."""
    history = History(old, events)
    redo = steps_to_redo(history)
    reopened = {history.planned[n].gather for n in redo} - {0}
    retained: list[Event] = [started]
    for event in events:
        is_dropped = isinstance(event, (RunStarted, LimitRaised, *ENDS)) or getattr(event, "n", -1) in {0, *redo}
        if not is_dropped and not (isinstance(event, GatherClosed) and event.first in reopened):
            retained.append(event)
    interrupted = {
        n: planned.digest
        for n, planned in history.planned.items()
        if n in redo and n not in history.ended and planned.lane == "queued"
    }
    ended = sorted(set(history.planned) - redo)
    return RetryImport(old, new, retained, ended, interrupted), [
        n for n in sorted(redo) if history.planned[n].lane == "child"
    ]


async def _retained_tree(
    journal: Journal, old: str, new: str, events: Sequence[Event], started: RunStarted
) -> list[RetryImport]:
    """The import of the run, and of the sub-agents' runs below it that did not succeed."""
    top, delegates = retained_events(old, new, events, started)
    out = [top]
    for n in delegates:
        below = await journal.events(f"{old}/{n}")
        if len(below) < 2 or not isinstance(below[0], RunStarted):
            continue  # it has no step yet
        # Exactly what the planner will write when the flow asks for it again, so that the journal is recognised as this run's.
        begun = started.child(
            agent=below[0].agent,
            task=below[0].task,
            fields=below[0].fields,
            parent=new,
            parent_n=n,
            at_ms=below[0].at_ms,
        )
        out += await _retained_tree(journal, f"{old}/{n}", f"{new}/{n}", below, begun)
    return out


async def retry(run_id: str, *, crew: Crew, dispatch: Dispatch, journal: Journal) -> str:
    """Begin `ID~2` (then `~3`) with what the newest of these runs has done; answers the new run's id.

    Raises:
        RunError: there is no such run, it is open or done, or it is of a sub-agent or of another crew.
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
    started = was.retry(version=crew.version, limits=crew.limits.to_json())
    wire = dispatch.advance(new, was.agent, crew.queues.broker_name(crew.queues.first))
    answer = await journal.begin(
        NewRun(new, started, wire), NextSteps(), await _retained_tree(journal, old, new, events, started)
    )
    if isinstance(answer, Refused):
        raise RunError(
            f"run {new} exists with another agent or task", hint=f"see: agentmesh runs show {new}", run_id=new
        )
    return new


async def latest_retry(journal: Journal, run_id: str) -> RunHead:
    """The run's newest retry, or the run itself."""
    head = await journal.head(run_id)
    if head is None:
        raise unknown_run(run_id)
    if "/" in run_id:
        root = run_id.partition("/")[0]
        raise RunError(
            f"run {run_id} is of a sub-agent", hint=f"retry the root run: agentmesh runs retry {root}", run_id=run_id
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
        raise RunError(f"run {run_id} is done, so there is nothing to retry", hint="begin a new run", run_id=run_id)
    if head.crew != crew.name:
        raise RunError(
            f"run {run_id} is of crew {head.crew!r}, and this is crew {crew.name!r}",
            hint=f"name the file of crew {head.crew!r}", run_id=run_id,
        )  # fmt: skip
