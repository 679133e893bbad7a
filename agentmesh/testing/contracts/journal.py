"""The contract of a Journal: each promise is a coroutine of a journal, and a class runs them.

Each gets an empty journal with leases of LEASE_MS, and raises AssertionError where the promise is broken.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from agentmesh.journal.events import Denied, Event, RunCancelled, RunDone, StepDone, StepPlanned, StepRetried
from agentmesh.journal.journal import Journal
from agentmesh.journal.run_spec import RunSpec
from agentmesh.journal.types import (
    Accepted,
    Claimed,
    GatherPlan,
    NewRun,
    NextSteps,
    Refused,
    StepPlan,
    TaskMessage,
    Token,
    advance_unit,
    step_unit,
)
from agentmesh.testing.contracts.base import Contract, check

LEASE_MS = 300
LARGE = 100_000  # characters; more than an event holds inline
Promise = Callable[[Journal], Awaitable[None]]


def _run(run_id: str, task: Any = "task") -> NewRun:
    return NewRun(run_id, RunSpec(crew="crew", agent="Agent", task=task), _wire(advance_unit(run_id)))


def _wire(unit: str) -> TaskMessage:
    return TaskMessage("queue", f"{unit}#", "")


def _steps(run_id: str, *ns: int, gather: GatherPlan | None = None) -> NextSteps:
    event = {n: StepPlanned(n=n, kind="Call", name="f", digest="d", gather=gather.first if gather else 0) for n in ns}
    return NextSteps([StepPlan(event[n], "queued", _wire(step_unit(run_id, n))) for n in ns], gather)


async def _claim(journal: Journal, unit: str, *, worker: str = "w", token: str = "t") -> Claimed | Refused:
    return await journal.claim(unit, worker=worker, token=token, version=0, crew="crew", crew_version="")


async def _claimed(journal: Journal, unit: str, **options: str) -> Claimed:
    claimed = await _claim(journal, unit, **options)
    assert isinstance(claimed, Claimed), claimed
    return claimed


async def _kinds(journal: Journal, run_id: str) -> list[str]:
    return [type(e).__name__ for e in await journal.events(run_id)]


async def a_run_from_begin_to_end(journal: Journal) -> None:
    """Begin, claim, commit with the end; the head and the list of runs show it."""
    assert isinstance(await journal.begin(_run("r"), _steps("r", 1)), Accepted)
    claimed = await _claimed(journal, step_unit("r", 1))
    done, end = StepDone(n=1, value="v"), NextSteps(end=RunDone(value="v"))
    await journal.commit(step_unit("r", 1), fence=claimed.fence, event=done, version=claimed.version, next=end)
    assert await _kinds(journal, "r") == ["RunStarted", "StepPlanned", "StepDone", "RunDone"]
    head = await journal.head("r")
    assert head is not None
    assert head.status == "done"
    assert [h.id for h in await journal.runs()] == ["r"]
    assert await journal.tree("r") == ["r"]
    assert await journal.head("nobody") is None


async def begin_is_repeatable(journal: Journal) -> None:
    """Repeated with the same spec it changes nothing; with another spec under the same id it is refused."""
    await journal.begin(_run("r"), _steps("r", 1))
    before = await _kinds(journal, "r")
    repeated = await journal.begin(_run("r"), _steps("r", 1))
    assert isinstance(repeated, Accepted)
    assert repeated.is_repeat
    other = await journal.begin(_run("r", "another"), _steps("r", 1))
    assert isinstance(other, Refused)
    assert other.why == "exists"
    assert await _kinds(journal, "r") == before


async def one_claim_at_a_time(journal: Journal) -> None:
    """The same token gets the same fence; another worker is refused."""
    await journal.begin(_run("r"), _steps("r", 1))
    first = await _claimed(journal, step_unit("r", 1), token="a")
    assert (await _claimed(journal, step_unit("r", 1), token="a")).fence == first.fence
    assert isinstance(await _claim(journal, step_unit("r", 1), worker="x", token="b"), Refused)
    assert isinstance(await _claim(journal, step_unit("r", 2)), Refused)


async def commit_is_repeatable_and_fenced(journal: Journal) -> None:
    """Sent twice it is written once; under an old fence it is refused."""
    await journal.begin(_run("r"), _steps("r", 1))
    unit, done = step_unit("r", 1), StepDone(n=1, value=1)
    old = await _claimed(journal, unit, worker="dead", token="a")
    assert await journal.release("dead", crashed=True) == 1
    new = await _claimed(journal, unit, token="b")
    assert new.fence > old.fence
    assert isinstance(await journal.commit(unit, fence=old.fence, event=done, version=old.version), Refused)
    for _ in range(2):
        assert isinstance(await journal.commit(unit, fence=new.fence, event=done, version=new.version), Accepted)
    assert (await _kinds(journal, "r")).count("StepDone") == 1


async def a_retry_is_claimed_again(journal: Journal) -> None:
    """A failed attempt is recorded once and claimed again under a new fence."""
    await journal.begin(_run("r"), _steps("r", 1))
    unit = step_unit("r", 1)
    first = await _claimed(journal, unit, token="a")
    event = StepRetried(n=1, error={"type": "ToolError", "message": "no"}, after_ms=0)
    for _ in range(2):
        assert isinstance(await journal.commit(unit, fence=first.fence, event=event, version=first.version), Accepted)
    assert (await _kinds(journal, "r")).count("StepRetried") == 1
    assert (await _claimed(journal, unit, token="b")).attempt == 2


async def a_lease_runs_out_unless_renewed(journal: Journal) -> None:
    """After a sweep another worker claims an expired lease; the old holder learns of it at its next renewal."""
    await journal.begin(_run("r"), _steps("r", 1))
    unit = step_unit("r", 1)
    await journal.sweep("w")
    held = await _claimed(journal, unit, worker="slow", token="a")
    for _ in range(3):
        await asyncio.sleep(LEASE_MS / 2000)
        assert list(await journal.renew("slow", [(unit, held.fence)])) == []
        await journal.sweep("w")
    assert isinstance(await _claim(journal, unit, worker="x", token="b"), Refused)
    await asyncio.sleep(LEASE_MS * 2 / 1000)
    await journal.sweep("w")
    assert (await _claimed(journal, unit, worker="x", token="b")).fence > held.fence
    assert list(await journal.renew("slow", [(unit, held.fence)])) == [unit]


async def a_gather_joins_once(journal: Journal) -> None:
    """Its members end in any order; the advance is claimable when the last one has, and plans what follows once."""
    gather = GatherPlan(first=1, last=3, need=3)
    await journal.begin(_run("r"), _steps("r", 1, 2, 3, gather=gather))
    for n in (3, 1, 2):
        assert isinstance(await _claim(journal, advance_unit("r"), token=f"early{n}"), Refused)
        claimed = await _claimed(journal, step_unit("r", n), token=f"t{n}")
        await journal.commit(step_unit("r", n), fence=claimed.fence, event=StepDone(n=n, value=n))
    advance = await _claimed(journal, advance_unit("r"), token="a")
    for _ in range(2):
        answer = await journal.plan(
            "r", fence=advance.fence, version=advance.version, next=NextSteps(end=RunDone(value=6))
        )
        assert isinstance(answer, Accepted), answer
    kinds = await _kinds(journal, "r")
    assert [kinds.count(k) for k in ("StepDone", "GatherClosed", "RunDone")] == [3, 1, 1]


async def a_cancelled_run_takes_no_more(journal: Journal) -> None:
    """After a cancellation and a sweep the run has ended, and a commit of a leased step is refused."""
    await journal.begin(_run("r"), _steps("r", 1))
    held = await _claimed(journal, step_unit("r", 1))
    assert isinstance(await journal.signal("r", RunCancelled(by="me")), Accepted)
    await journal.sweep("w")
    late: Event = StepDone(n=1, value=1)
    assert isinstance(await journal.commit(step_unit("r", 1), fence=held.fence, event=late), Refused)
    head = await journal.head("r")
    assert head is not None
    assert head.status == "cancelled"


def _delegate(parent: str, n: int) -> StepPlan:
    child = _run(f"{parent}/{n}")
    event = StepPlanned(n=n, kind="Delegate", name="B", lane="child")
    return StepPlan(event, "child", child=replace(child, spec=replace(child.spec, parent=parent, parent_n=n)))


def _held(n: int, detail: dict[str, Any]) -> StepPlan:
    event = StepPlanned(n=n, kind="Call", name=f"tool{n}", detail=detail)
    return StepPlan(event, "held", _wire(step_unit("r/1", n)), held="approve")


async def open_entries_of_a_tree(journal: Journal) -> None:
    """The moving and the waiting entries below a run, with the plan of each waiting step; no ended ones."""
    gather = GatherPlan(first=1, last=2, need=2)
    await journal.begin(_run("r"), NextSteps([_delegate("r", 1), _delegate("r", 2)], gather))
    entries = await journal.open_entries("r")
    assert (entries.moving, list(entries.waiting)) == (2, [])  # the advances of the two
    below = await _claimed(journal, advance_unit("r/1"), token="a")
    large = {"text": "x" * LARGE}
    plans = NextSteps([_held(1, large), _held(2, {"to": "Ann"})], GatherPlan(first=1, last=2, need=2))
    assert isinstance(await journal.plan("r/1", fence=below.fence, version=below.version, next=plans), Accepted)
    entries = await journal.open_entries("r")
    waits = [(entry.run_id, entry.key, entry.why, entry.name, entry.detail) for entry in entries.waiting]
    assert waits == [("r/1", "1", "approve", "tool1", large), ("r/1", "2", "approve", "tool2", {"to": "Ann"})]
    assert entries.moving == 1
    assert (await journal.open_entries("r/2")).moving == 1
    assert (await journal.open_entries("r/2")).waiting == []
    assert isinstance(await journal.signal("r/1", Denied(n=1)), Accepted)  # the gather has failed, so step 2 is dropped
    assert list((await journal.open_entries("r")).waiting) == []
    assert isinstance(await journal.signal("r", RunCancelled()), Accepted)
    await journal.sweep("w")
    assert await journal.open_entries("r") == await journal.open_entries("nobody")


async def new_events_of_many_runs(journal: Journal) -> None:
    """Each run's events after its known version, in the order of the argument; runs without new events are left out."""

    async def ask(versions: dict[str, int]) -> dict[str, list[str]]:
        kinds: dict[str, list[str]] = {}
        async for run, events in journal.new_events(versions):
            kinds.setdefault(run, []).extend(type(e).__name__ for e in events)
        return kinds

    for run in "abc":
        await journal.begin(_run(run), _steps(run, 1))
    begun = ["RunStarted", "StepPlanned"]
    assert list((await ask({"b": 0, "a": 1, "c": 2, "nobody": 0})).items()) == [("b", begun), ("a", begun[1:])]
    assert await ask({"a": 9}) == {"a": begun}  # begun anew, after the store lost events
    assert await ask({}) == {}


async def large_values_come_back_whole(journal: Journal) -> None:
    """In whatever form they are stored."""
    task, value = "t" * LARGE, "v" * LARGE
    await journal.begin(_run("r", task), _steps("r", 1))
    claimed = await _claimed(journal, step_unit("r", 1))
    await journal.commit(step_unit("r", 1), fence=claimed.fence, event=StepDone(n=1, value=value))
    done = [e for e in await journal.events("r") if isinstance(e, StepDone)]
    assert done[0].value == value
    assert getattr((await journal.events("r"))[0], "task", None) == task


async def watch_and_stream_end_with_the_run(journal: Journal) -> None:
    """`watch` returns when the run ends; the live stream is read from its beginning."""
    await journal.begin(_run("r"), _steps("r", 1))
    claimed = await _claimed(journal, step_unit("r", 1))
    await journal.stream("r", [Token("r", 1, 1, "text", word) for word in ("one ", "two")])
    watching = asyncio.ensure_future(journal.watch("r", version=None, timeout_s=10))
    await asyncio.sleep(0)
    done, end = StepDone(n=1, value=1), NextSteps(end=RunDone(value=1))
    await journal.commit(step_unit("r", 1), fence=claimed.fence, event=done, version=claimed.version, next=end)
    await asyncio.wait_for(watching, 8)
    assert [token.text async for token in journal.tokens("r")] == ["one ", "two"]


JOURNAL: tuple[Promise, ...] = (
    a_run_from_begin_to_end, begin_is_repeatable, one_claim_at_a_time, commit_is_repeatable_and_fenced,
    a_retry_is_claimed_again, a_lease_runs_out_unless_renewed, a_gather_joins_once, a_cancelled_run_takes_no_more,
    open_entries_of_a_tree, new_events_of_many_runs, large_values_come_back_whole, watch_and_stream_end_with_the_run,
)  # fmt: skip


class JournalContract(Contract):
    """Tests of a Journal. `make` makes one with leases of LEASE_MS, over an empty store each time."""

    def make(self) -> Journal:
        """A new journal without runs, such as `MyJournal(url, ttl_ms=LEASE_MS)`."""
        raise NotImplementedError(f"{type(self).__name__} needs `make`")

    def hold(self, promise: Promise) -> None:
        """Run one promise of JOURNAL."""

        async def main() -> None:
            journal = self.make()
            try:
                await promise(journal)
            finally:
                await journal.close()

        asyncio.run(main())


def _as_test(promise: Promise) -> Callable[[JournalContract], None]:
    def test(self: JournalContract) -> None:
        self.hold(promise)

    test.__doc__ = promise.__doc__
    return test


for _promise in JOURNAL:
    setattr(JournalContract, f"test_{_promise.__name__}", _as_test(_promise))


def check_journal(make: Callable[[], Journal]) -> None:
    """Run JournalContract against what `make` gives.

    Raises:
        AssertionError: a promise is broken.
    """
    check(JournalContract, make)
