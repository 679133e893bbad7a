"""Taking up an ended run again: which of its facts the new run begins with, and which steps it does anew. Starts nothing."""

from collections.abc import Sequence
from dataclasses import replace

from agentmesh.crew import Crew
from agentmesh.errors import RunError
from agentmesh.event import (
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
from agentmesh.journal import Journal
from agentmesh.ports import Carried, Dispatch, Next, Refused, RunHead, RunSpec
from agentmesh.replay import History


def to_redo(history: History) -> set[int]:
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


def carried(old: str, new: str, events: Sequence[Event], started: RunStarted) -> tuple[Carried, list[int]]:
    """What run `new` begins with of the journal of `old`, after its own `started`; and the Delegates it does anew."""
    history = History(old, events)
    redo = to_redo(history)
    reopened = {history.planned[n].gather for n in redo} - {0}
    kept: list[Event] = [started]
    for event in events:
        gone = isinstance(event, (RunStarted, LimitRaised, *ENDS)) or getattr(event, "n", -1) in {0, *redo}
        if not gone and not (isinstance(event, GatherClosed) and event.first in reopened):
            kept.append(event)
    cut = {
        n: planned.digest
        for n, planned in history.planned.items()
        if n in redo and n not in history.ended and planned.kind == "Call"
    }
    known = sorted(set(history.planned) - redo)
    return Carried(old, new, kept, known, cut), [n for n in sorted(redo) if history.planned[n].kind == "Delegate"]


async def _carried_tree(
    journal: Journal, old: str, new: str, events: Sequence[Event], started: RunStarted
) -> list[Carried]:
    """The run's, and those of the sub-agents that had not come to a good end."""
    top, delegates = carried(old, new, events, started)
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
        out += await _carried_tree(journal, f"{old}/{n}", f"{new}/{n}", below, begun)
    return out


async def retry(run_id: str, *, crew: Crew, dispatch: Dispatch, journal: Journal) -> str:
    """Begin `ID~2` (then `~3`) with the facts of the newest of that line; answers the new run's id.

    Raises:
        RunError: there is no such run, it is open or done, it is a sub-agent's, or another crew's.
    """
    last = await newest(journal, run_id)
    old = last.id
    _check(last, crew)
    first, _, k = old.partition("~")
    new = f"{first}~{int(k or 1) + 1}"
    events = await journal.events(old)
    was = events[0]
    assert isinstance(was, RunStarted)
    crew.agent(was.agent, was.fields)
    started = replace(was, version=crew.version, limits=crew.limits.to_json(), canvas=None)
    spec = RunSpec(
        new, crew.name, crew.version, was.agent, was.task, was.fields, was.history, limits=started.limits,
        wire=dispatch.advance(new, was.agent, crew.broker_queue(crew.queue)), origin=was.origin, stream=was.stream,
        trace=was.trace,
    )  # fmt: skip
    answer = await journal.begin(spec, Next(), await _carried_tree(journal, old, new, events, started))
    if isinstance(answer, Refused):
        raise RunError(f"run {new} exists with another agent or task", run_id=new)
    return new


async def newest(journal: Journal, run_id: str) -> RunHead:
    """The run, or the last retry of it that there is."""
    head = await journal.head(run_id)
    if head is None:
        raise RunError(f"there is no run {run_id!r}; `agentmesh runs ls` lists them", run_id=run_id)
    if "/" in run_id:
        root = run_id.partition("/")[0]
        raise RunError(f"run {run_id} is a sub-agent's; retry the whole: agentmesh runs retry {root}", run_id=run_id)
    first, _, k = run_id.partition("~")
    count = int(k or 1)
    while (later := await journal.head(f"{first}~{count + 1}")) is not None:
        head, count = later, count + 1
    return head


def _check(head: RunHead, crew: Crew) -> None:
    run_id = head.id
    if head.status == "open":
        raise RunError(
            f"run {run_id} has not ended, and only an ended run is retried; let it go on with `agentmesh runs resume "
            f"{run_id}`, a held step with `agentmesh runs resolve {run_id} N retry|failed|done`, or end it with "
            f"`agentmesh runs cancel {run_id}`",
            run_id=run_id,
        )
    if head.status == "done":
        raise RunError(f"run {run_id} is done; there is nothing to do again", run_id=run_id)
    if head.crew != crew.name:
        raise RunError(
            f"run {run_id} is of crew {head.crew!r} and this is crew {crew.name!r}: name its file", run_id=run_id
        )
