"""Promises that any Journal keeps, as plain async functions: run each against a journal of yours. Knows no pytest.

    @pytest.mark.parametrize("promise", JOURNAL_PROMISES)
    def test_it(promise):
        asyncio.run(promise(make))

`make(clock, send)` gives a fresh Journal whose time in ms is `clock()` and which hands each message to `send`.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from agentmesh.event import Approved, RunCancelled, RunDone, RunStarted, StepDone, StepPlanned, StepRetried
from agentmesh.journal import Journal
from agentmesh.ports import (
    Accepted,
    Carried,
    Claimed,
    Next,
    Plan,
    Refused,
    RunSpec,
    Sent,
    Wire,
    advance_unit,
    step_unit,
)

Make = Callable[[Callable[[], int], Callable[[Sent], None]], Journal]
TTL_MS = 10_000  # the journal's `ttl_ms`: its default
WHO: dict[str, Any] = {"worker": "w", "version": 0, "crew": "c", "crew_version": ""}


class _World:
    """A journal, its clock and what it sent."""

    def __init__(self, make: Make) -> None:
        self.now_ms, self.sent = 1_000_000, 0
        self.journal = make(lambda: self.now_ms, self._send)

    def _send(self, sent: Sent) -> None:
        self.sent += 1

    async def begun(self, task: str = "t", state: Any = "queued") -> Accepted | Refused:
        """Run `r` with one step."""
        plan = Plan(StepPlanned(n=1, kind="Call", name="f", digest="d"), state, Wire("q", "s|r|1#", ""),
                    held="approve" if state == "held" else "")  # fmt: skip
        spec = RunSpec("r", "c", "", "A", task, wire=Wire("q", f"{advance_unit('r')}#", ""))
        return await self.journal.begin(spec, Next([plan]))

    async def claimed(self, token: str = "t1", **who: Any) -> Claimed:
        """The step's lease."""
        got = await self.journal.claim(step_unit("r", 1), token=token, **{**WHO, **who})
        assert isinstance(got, Claimed), got
        return got

    async def done(self, fence: int, version: int) -> Accepted | Refused:
        """The step's end, and the run's."""
        event, end = StepDone(n=1, value=1), Next(end=RunDone(value=1))
        return await self.journal.commit(step_unit("r", 1), fence=fence, event=event, version=version, next=end)

    async def kinds(self) -> list[str]:
        """The names of the run's facts."""
        return [type(e).__name__ for e in await self.journal.events("r")]


async def begin_is_repeatable(make: Make) -> None:
    """The same spec again is the run that is there; another one is refused; nothing is written or sent twice."""
    w = _World(make)
    assert isinstance(await w.begun(), Accepted)
    again = await w.begun()
    assert isinstance(again, Accepted)
    assert again.again
    assert isinstance(await w.begun("another task"), Refused)
    assert w.sent == 1
    first, planned = await w.journal.events("r")
    assert isinstance(first, RunStarted)
    assert isinstance(planned, StepPlanned)
    await w.journal.close()


async def a_claim_excludes_others_and_answers_its_own_token_alike(make: Make) -> None:
    """One lease a unit; the same token gets the same fence; events after the version asked for come with it."""
    w = _World(make)
    await w.begun()
    one, again = await w.claimed(), await w.claimed()
    assert one.fence == again.fence
    assert [type(e).__name__ for e in one.events] == ["RunStarted", "StepPlanned"]
    other = await w.journal.claim(step_unit("r", 1), token="t2", **WHO)
    assert isinstance(other, Refused)
    assert other.why == "busy"
    await w.journal.close()


async def a_commit_is_once_and_repeatable(make: Make) -> None:
    """The first commit under the newest fence ends the step; said again it changes nothing; late ones are refused."""
    w = _World(make)
    await w.begun()
    c = await w.claimed()
    assert isinstance(await w.done(c.fence, c.version), Accepted)
    again = await w.done(c.fence, c.version)
    assert isinstance(again, Accepted)
    assert again.again
    assert isinstance(await w.done(c.fence + 1, c.version), Refused)
    assert await w.kinds() == ["RunStarted", "StepPlanned", "StepDone", "RunDone"]
    head = await w.journal.head("r")
    assert head is not None
    assert head.status == "done"
    assert isinstance(await w.journal.claim(step_unit("r", 1), token="t3", **WHO), Refused)
    await w.journal.close()


async def a_lease_that_runs_out_is_given_to_another_and_fences_the_first(make: Make) -> None:
    """Renewed it lives; not renewed the sweep sends it again, and a zombie's commit is refused after the next claim."""
    w = _World(make)
    await w.begun()
    c = await w.claimed()
    w.now_ms += TTL_MS - 1
    assert list(await w.journal.renew("w", [(step_unit("r", 1), c.fence)])) == []
    w.now_ms += TTL_MS - 1
    await w.journal.sweep("s")
    assert w.sent == 1
    w.now_ms += 2
    await w.journal.sweep("s")
    assert w.sent == 2
    second = await w.claimed("t2", worker="v")
    assert second.fence > c.fence
    assert second.attempt == 2
    assert list(await w.journal.renew("w", [(step_unit("r", 1), c.fence)])) == [step_unit("r", 1)]
    assert isinstance(await w.done(c.fence, c.version), Refused)
    assert isinstance(await w.done(second.fence, second.version), Accepted)
    await w.journal.close()


async def release_gives_back_at_once(make: Make) -> None:
    """What a dead worker held goes out again without waiting for its lease; a second release finds nothing."""
    w = _World(make)
    await w.begun()
    await w.claimed()
    assert await w.journal.release("w", crashed=True, queues=["q"]) == 1
    assert await w.journal.release("w", crashed=True, queues=["q"]) == 0
    assert w.sent == 2
    assert (await w.claimed("t2", worker="v")).attempt == 2
    await w.journal.close()


async def a_turn_is_told_once_and_comes_when_it_is_due(make: Make) -> None:
    """StepRetried waits for its time, and then goes out."""
    w = _World(make)
    await w.begun()
    c = await w.claimed()
    turn = StepRetried(n=1, error={"type": "ModelError", "message": "m"}, after_ms=5_000)
    for _ in range(2):
        assert isinstance(await w.journal.commit(step_unit("r", 1), fence=c.fence, event=turn), Accepted)
    assert (await w.kinds()).count("StepRetried") == 1
    assert isinstance(await w.journal.claim(step_unit("r", 1), token="t2", **WHO), Refused)
    w.now_ms += 5_000
    await w.journal.sweep("s")
    assert (await w.claimed("t3")).attempt == 2
    await w.journal.close()


async def a_held_step_waits_for_its_person(make: Make) -> None:
    """It is shown as waiting, nobody may claim it, and a yes sends it; a second yes is refused."""
    w = _World(make)
    await w.begun(state="held")
    assert [(h.run_id, h.key, h.why) for h in await w.journal.waiting("r")] == [("r", "1", "approve")]
    assert w.sent == 0
    assert isinstance(await w.journal.tell("r", Approved(n=1)), Accepted)
    assert isinstance(await w.journal.tell("r", Approved(n=1)), Refused)
    assert w.sent == 1
    await w.claimed()
    await w.journal.close()


async def a_cancelled_run_takes_nothing_more(make: Make) -> None:
    """Leases are lost at the next renewal, commits are refused, the end is written once."""
    w = _World(make)
    await w.begun()
    c = await w.claimed()
    assert isinstance(await w.journal.tell("r", RunCancelled(by="ana")), Accepted)
    assert list(await w.journal.renew("w", [(step_unit("r", 1), c.fence)])) == [step_unit("r", 1)]
    assert isinstance(await w.done(c.fence, c.version), Refused)
    assert (await w.kinds())[-1] == "RunCancelled"
    assert isinstance(await w.journal.tell("r", RunCancelled(by="ben")), Refused)
    await w.journal.close()


async def a_lost_message_is_sent_again(make: Make) -> None:
    """An entry whose queue has been empty for a second is overdue, and is sent again after ever longer waits."""
    w = _World(make)
    await w.begun()
    w.now_ms += 1_001
    await w.journal.sweep("s", empty=["q"])
    assert w.sent == 2
    await w.journal.sweep("s", empty=["q"])
    assert w.sent == 2
    await w.claimed()
    await w.journal.close()


async def a_retry_begins_with_what_is_carried(make: Make) -> None:
    """Facts keep their times, what has ended is not planned again, and the same retry again is the run that is there."""
    w = _World(make)
    await w.begun()
    c = await w.claimed()
    await w.done(c.fence, c.version)
    facts = (await w.journal.events("r"))[:-1]
    w.now_ms += 60_000
    spec = RunSpec("r~2", "c", "", "A", "t", wire=Wire("q", f"{advance_unit('r~2')}#", ""))
    answers = [await w.journal.begin(spec, Next(), [Carried("r", "r~2", facts, [1], {})]) for _ in range(2)]
    assert [isinstance(a, Accepted) and a.again for a in answers] == [False, True]
    assert [(e, e.at_ms) for e in await w.journal.events("r~2")] == [(e, e.at_ms) for e in facts]
    claimed = await w.journal.claim(advance_unit("r~2"), token="t2", **WHO)
    assert isinstance(claimed, Claimed)
    assert isinstance(await w.journal.claim(step_unit("r~2", 1), token="t3", **WHO), Refused)
    await w.journal.close()


JOURNAL_PROMISES: tuple[Callable[[Make], Awaitable[None]], ...] = (
    begin_is_repeatable,
    a_claim_excludes_others_and_answers_its_own_token_alike,
    a_commit_is_once_and_repeatable,
    a_lease_that_runs_out_is_given_to_another_and_fences_the_first,
    release_gives_back_at_once,
    a_turn_is_told_once_and_comes_when_it_is_due,
    a_held_step_waits_for_its_person,
    a_cancelled_run_takes_nothing_more,
    a_lost_message_is_sent_again,
    a_retry_begins_with_what_is_carried,
)
