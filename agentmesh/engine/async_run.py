"""A handle to one run, for code on an event loop: everything that asks the journal is awaited."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, cast

from agentmesh.definitions.crew import Crew
from agentmesh.definitions.limits import Limits
from agentmesh.engine.dispatch import Dispatch
from agentmesh.engine.replay import History, replay
from agentmesh.engine.run_errors import refusal_error, run_error, unknown_run
from agentmesh.engine.run_retry import latest_retry, retry
from agentmesh.errors import RunError
from agentmesh.journal.events import (
    ENDS,
    Approved,
    Denied,
    Event,
    LimitRaised,
    RunCancelled,
    RunDone,
    StepResolved,
    StepRevived,
)
from agentmesh.journal.journal import Journal
from agentmesh.journal.tree_follower import TreeFollower, tree_events
from agentmesh.journal.types import Refused, RunHead, Token, WaitingEntry
from agentmesh.message import Message
from agentmesh.schema import from_json

Out = TypeVar("Out")
T = TypeVar("T")
Status = Literal["open", "done", "failed", "cancelled"]
Resolution = Literal["done", "failed", "retry"]
WATCH_S = 30.0  # the longest that the journal is asked to wait at once
TREE_POLL_S, MAX_TREE_POLL_S = 0.1, 2.0  # how often `follow` reads the tree: a small one, a large one
QUIET_S = 0.05  # where runs advance only inside calls, a stream that brings nothing for so long has ended


@dataclass(frozen=True, slots=True)
class Approval:
    """Something the run waits for: an approval (`approve`), a decision (`in_doubt`), a higher limit, another worker.

    Args:
        n: the step's number; 0 is the run itself.
        name: of the tool or agent, or `Approve`.
        args: a held tool's arguments, or the question.
    """

    run_id: str
    n: int
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    why: str = "approve"


def _approval(entry: WaitingEntry) -> Approval:
    if not entry.key.isdigit():
        return Approval(entry.run_id, 0, "run", {}, entry.why)
    args = entry.detail if isinstance(entry.detail, dict) else {}
    return Approval(entry.run_id, int(entry.key), entry.name, args, entry.why)


class RunClient:
    """What a handle needs of where the run lives.

    Args:
        crew: None where only its journal is at hand; values then stay plain JSON.
        run_sync: runs a coroutine to its end, for plain code.
        on_change: called after a decision was recorded; a mesh without workers continues its runs here.
        dispatch: renders the messages of a retry; None where no crew is at hand.
    """

    def __init__(
        self, *, crew: Crew | None, journal: Journal, run_sync: Callable[[Coroutine[Any, Any, Any]], Any],
        on_change: Callable[[], Awaitable[None]] | None = None, dispatch: Dispatch | None = None,
    ) -> None:  # fmt: skip
        self.crew, self.journal = crew, journal
        self._run_sync, self._on_change, self._dispatch = run_sync, on_change, dispatch

    @property
    def is_synchronous(self) -> bool:
        """Whether runs advance only inside calls, so that waiting for one would never end."""
        return self._on_change is not None

    def run_sync(self, coro: Coroutine[Any, Any, T]) -> T:
        """The coroutine's value, for plain code."""
        return cast(T, self._run_sync(coro))

    def get(self, run_id: str) -> "AsyncRun[Any]":
        """A handle to a run; whether it exists shows when it is used."""
        return AsyncRun(run_id, self)

    async def signal(self, run_id: str, event: Event) -> None:
        """Record a human decision.

        Raises:
            RunError: there is no such run, it has ended, or it is not waiting for this.
        """
        answer = await self.journal.signal(run_id, event)
        if isinstance(answer, Refused):
            raise refusal_error(run_id, event, answer)
        if self._on_change is not None:
            await self._on_change()

    async def retry(self, run_id: str) -> str:
        """Begin the run again with what it has done; answers the new run's id.

        Raises:
            RunError: it is not a run that can be retried, or its crew's code is not at hand.
        """
        if self.crew is None or self._dispatch is None:
            raise RunError(
                f"run {run_id} cannot be retried without the code of its crew", hint=f"run: agentmesh runs retry {run_id}",
                run_id=run_id,
            )  # fmt: skip
        new = await retry(run_id, crew=self.crew, dispatch=self._dispatch, journal=self.journal)
        if self._on_change is not None:
            await self._on_change()
        return new


class AsyncRun(Generic[Out]):
    """A handle to one run; `await` it for its value. `agentmesh.Run` has the same words for plain code."""

    def __init__(self, run_id: str, client: RunClient) -> None:
        self.run_id, self.client, self._journal = run_id, client, client.journal

    def __repr__(self) -> str:
        return f"AsyncRun({self.run_id!r})"

    def __await__(self) -> Generator[Any, None, Out]:
        return self.result().__await__()

    # ---- the end -------------------------------------------------------------------------------
    async def result(self, *, timeout_s: float | None = None) -> Out:
        """The run's value, once it has one.

        Raises:
            RunFailedError, RunCancelledError, LimitReached: it ended without one.
            TimeoutError: it has not ended in time; it continues.
        """
        if timeout_s is None and self.client.is_synchronous:
            timeout_s = 0
        head = await self._ended(timeout_s)
        if head is None:
            waits = "; ".join(f"{a.run_id} step {a.n} ({a.name}): {a.why}" for a in await self.waiting_for())
            raise TimeoutError(
                f"run {self.run_id} has not ended after {timeout_s} s" + (f"; waiting: {waits}" if waits else "")
            )
        (end,) = await self._journal.events(self.run_id, after=-1)
        if not isinstance(end, ENDS):  # a tolerant gather's late member was recorded after the end
            end = next(e for e in reversed(await self._journal.events(self.run_id)) if isinstance(e, ENDS))
        if isinstance(end, RunDone):
            crew = self.client.crew
            agent = crew.agents.get(head.agent) if crew is not None else None
            return cast(Out, from_json(end.value, agent.output) if agent is not None else end.value)
        raise run_error(self.run_id, end)

    async def wait(self, *, timeout_s: float | None = None) -> bool:
        """Whether the run has ended; returns when it has, or after `timeout_s`.

        Raises:
            RunError: there is no such run.
        """
        return await self._ended(timeout_s) is not None

    async def _ended(self, timeout_s: float | None) -> RunHead | None:
        """The head of the ended run; None after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (head := await self.head()).status == "open":
            remaining_s = WATCH_S if deadline is None else deadline - time.monotonic()
            if remaining_s <= 0:
                return None
            await self._journal.watch(self.run_id, version=None, timeout_s=min(remaining_s, WATCH_S))
        return head

    # ---- what happens --------------------------------------------------------------------------
    async def status(self) -> Status:
        """open, done, failed or cancelled."""
        return (await self.head()).status

    async def head(self) -> RunHead:
        """The run at a glance: status, agent, turns, tokens, cost.

        Raises:
            RunError: there is no such run.
        """
        head = await self._journal.head(self.run_id)
        if head is None:
            raise unknown_run(self.run_id)
        return head

    async def events(self) -> list[Event]:
        """The journal so far."""
        return await self._journal.events(self.run_id)

    async def tree(self) -> "list[AsyncRun[Any]]":
        """The run and every run below it, parents before children."""
        return [self.client.get(run_id) for run_id in await self._journal.tree(self.run_id)]

    async def tree_events(self) -> list[tuple[str, Event]]:
        """The journal so far of the run and every run below it, each event with its run's id: the run's own first, then by depth."""
        return await tree_events(self._journal, self.run_id)

    async def follow(self) -> AsyncGenerator[tuple[str, Event], None]:
        """Each event of the tree with its run's id, until this run's end; parents before children."""
        tree = TreeFollower(self._journal, self.run_id)
        while not tree.ended:
            began_s, news = time.monotonic(), False
            async for member, event in tree.new_events():
                news = True
                yield member, event
            if not tree.ended:
                if self.client.is_synchronous and not news:
                    return
                # a large tree is read less often: its readers take at most a tenth of the store's time
                pause_s = min(MAX_TREE_POLL_S, max(TREE_POLL_S, 10 * (time.monotonic() - began_s)))
                await self._journal.watch(self.run_id, version=tree.version, timeout_s=pause_s)

    async def live(self) -> AsyncGenerator[Token, None]:
        """Everything said live in the run's tree: text, progress, retractions; each with run, step and attempt."""
        async with _closing(self._journal.tokens(self.run_id)) as stream:
            async for token in _available(stream) if self.client.is_synchronous else stream:
                yield token

    async def tokens(self) -> AsyncGenerator[str, None]:
        """The text of the run's own model calls as it comes."""
        async with _closing(self.live()) as stream:
            async for token in stream:
                if token.kind == "text" and token.run_id == self.run_id:
                    yield token.text

    async def messages(self) -> list[Message]:
        """The conversation, for `history=` of another run."""
        history = History(self.run_id, await self._journal.events(self.run_id))
        if history.started is None:
            raise unknown_run(self.run_id)
        if self.client.crew is None:
            raise RunError(
                f"the messages of run {self.run_id} need the code of its crew", hint="read them from a Mesh of the crew",
                run_id=self.run_id,
            )  # fmt: skip
        agent = self.client.crew.agent(history.started.agent, dict(history.started.fields))
        return list(replay(agent, history).messages)

    # ---- human decisions -----------------------------------------------------------------------
    async def waiting_for(self) -> list[Approval]:
        """What is waiting for a decision in the whole tree."""
        return [_approval(entry) for entry in (await self._journal.open_entries(self.run_id)).waiting]

    async def blocked_on(self) -> list[Approval]:
        """`waiting_for`, when nothing else of the tree moves; empty while something does."""
        entries = await self._journal.open_entries(self.run_id)
        return [] if entries.moving else [_approval(entry) for entry in entries.waiting]

    async def approve(self, item: Approval, *, by: str = "") -> None:
        """Approve a waiting step."""
        await self.client.signal(item.run_id, Approved(n=item.n, by=by))

    async def deny(self, item: Approval, *, by: str = "", reason: str = "") -> None:
        """Deny a waiting step; the reason is passed to what requested the step, such as a model."""
        await self.client.signal(item.run_id, Denied(n=item.n, by=by, reason=reason))

    async def resolve(self, item: Approval, action: Resolution, *, value: Any = None, by: str = "") -> None:
        """Resolve a step in doubt."""
        await self.client.signal(item.run_id, StepResolved(n=item.n, action=action, value=value, by=by))

    async def revive(self, item: Approval, *, by: str = "") -> None:
        """Release a quarantined step or a blocked run."""
        await self.client.signal(item.run_id, StepRevived(n=item.n, by=by))

    async def raise_limits(self, limits: Mapping[str, float], *, by: str = "") -> None:
        """Raise the run's limits: `raise_limits({"turns": 50})`.

        Raises:
            DefinitionError: one is unknown, or not a number above 0.
        """
        Limits.check_raise(limits)
        await self.client.signal(self.run_id, LimitRaised(limits=dict(limits), by=by))

    async def cancel(self, *, by: str = "") -> None:
        """End the run and everything below it; what is running stops at its next token or lease renewal."""
        await self.client.signal(self.run_id, RunCancelled(by=by))

    # ---- retries -------------------------------------------------------------------------------
    async def retry(self) -> "AsyncRun[Out]":
        """Do an ended run's last, failed steps again, in a run `ID~2` (then `~3`) that begins with all that was done.

        Nothing that succeeded is done or paid again, steps of sub-agents included; limits are counted from zero.

        Raises:
            RunError: the run is open or done, or a sub-agent's.
        """
        return AsyncRun(await self.client.retry(self.run_id), self.client)

    async def latest(self) -> "AsyncRun[Out]":
        """The newest retry of this run; itself where it was never retried.

        Raises:
            RunError: there is no such run.
        """
        return AsyncRun((await latest_retry(self._journal, self.run_id)).id, self.client)


@asynccontextmanager
async def _closing(stream: AsyncIterator[T]) -> AsyncGenerator[AsyncIterator[T], None]:
    """The stream, closed at the end where it is a generator: it may hold a connection."""
    try:
        yield stream
    finally:
        if isinstance(stream, AsyncGenerator):
            await stream.aclose()


async def _available(stream: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """What a stream brings without a pause, where nothing new comes between calls."""
    with suppress(TimeoutError, StopAsyncIteration):
        while True:
            yield await asyncio.wait_for(anext(stream), QUIET_S)
