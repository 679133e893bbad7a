"""A handle to one execution: result, events, tokens, approve, cancel. Reads and tells; carries nothing forward."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, cast

from agentmesh.definitions.crew import Crew
from agentmesh.engine.dispatch import Dispatch
from agentmesh.engine.replay import History, replay
from agentmesh.engine.retry import retry
from agentmesh.errors import RunCancelled, RunError, RunFailed, StepError, error_from_json, message_of
from agentmesh.journal.events import (
    ENDS,
    Approved,
    Denied,
    Event,
    LimitRaised,
    RunDone,
    StepResolved,
    StepRevived,
)
from agentmesh.journal.events import RunCancelled as Cancelled
from agentmesh.journal.events import RunFailed as Failed
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import Refused, RunHead, Token, WaitingEntry
from agentmesh.message import Message
from agentmesh.schema import from_json

Out = TypeVar("Out")
T = TypeVar("T")
RunSync = Callable[[Coroutine[Any, Any, T]], T]
WATCH_S = 30.0


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

    @property
    def tool(self) -> str:
        """`name`, by its old name."""
        return self.name


def _approval(entry: WaitingEntry) -> Approval:
    if not entry.key.isdigit():
        return Approval(entry.run_id, 0, "run", {}, entry.why)
    args = entry.detail if isinstance(entry.detail, dict) else {}
    return Approval(entry.run_id, int(entry.key), entry.name, args, entry.why)


class RunClient:
    """What a handle needs of where the run lives.

    Args:
        crew: None where only its journal is at hand; values then stay plain JSON.
        drive: runs a coroutine to its end from plain code.
        moved: called after a word was told; a mesh without workers goes on here.
        dispatch: renders the messages of a retry; None where no crew is at hand.
    """

    def __init__(
        self, *, crew: Crew | None, journal: Journal, run_sync: Callable[[Coroutine[Any, Any, Any]], Any],
        on_change: Callable[[], Awaitable[None]] | None = None, dispatch: Dispatch | None = None,
    ) -> None:  # fmt: skip
        self.crew, self.journal, self._run_sync, self._on_change, self._dispatch = (
            crew,
            journal,
            run_sync,
            on_change,
            dispatch,
        )

    @property
    def is_synchronous(self) -> bool:
        """Whether runs advance only inside calls, so that waiting for one would never end."""
        return self._on_change is not None

    def run_sync(self, coro: Coroutine[Any, Any, T]) -> T:
        """The coroutine's value, for plain code."""
        return cast(T, self._run_sync(coro))

    async def signal(self, run_id: str, event: Event) -> None:
        """Record a human decision.

        Raises:
            RunError: there is no such run, it has ended, or it is not waiting for this.
        """
        answer = await self.journal.signal(run_id, event)
        if isinstance(answer, Refused):
            n, root = getattr(event, "n", None), run_id.partition("/")[0]
            messages = {
                "unknown": f"there is no run {run_id!r}; `agentmesh runs ls` lists them",
                "ended": f"run {run_id} has ended ({answer.detail})"
                + (f"; to retry its failed steps: agentmesh runs retry {root}" if answer.detail != "done" else ""),
                "run": f"run {run_id} is blocked as a whole ({answer.detail}), and only `retry` resolves it: "
                f"`agentmesh runs resolve {run_id} 0 retry`, or `agentmesh runs cancel {run_id}`",
                "not_waiting": f"step {n} of run {run_id} is not waiting for this{f' ({answer.detail})' if answer.detail else ''}",
            }
            raise RunError(messages.get(answer.why, answer.why), run_id=run_id)
        if self._on_change is not None:
            await self._on_change()

    async def retry(self, run_id: str) -> str:
        """Begin the run again with what it has done; answers the new run's id.

        Raises:
            RunError: it is not a run that can be retried, or its crew's code is not at hand.
        """
        if self.crew is None or self._dispatch is None:
            raise RunError(
                f"a retry of run {run_id} needs the code of its crew: agentmesh runs retry {run_id}", run_id=run_id
            )
        new = await retry(run_id, crew=self.crew, dispatch=self._dispatch, journal=self.journal)
        if self._on_change is not None:
            await self._on_change()
        return new


class Run(Generic[Out]):
    """A handle to one run; `await` it, or ask for its `result()`."""

    def __init__(self, run_id: str, client: RunClient) -> None:
        self.run_id, self._client, self._journal = run_id, client, client.journal

    def __repr__(self) -> str:
        return f"Run({self.run_id!r})"

    @property
    def id(self) -> str:
        """`run_id`, by its old name."""
        return self.run_id

    # ---- the end -------------------------------------------------------------------------------
    def result(self, *, timeout_s: float | None = None) -> Out:
        """The run's value, once it has one.

        Raises:
            RunFailed, RunCancelled, LimitReached: it ended without one.
            TimeoutError: it has not ended in time; it goes on.
        """
        return self._client.run_sync(self.wait(timeout_s=timeout_s))

    def __await__(self) -> Generator[Any, None, Out]:
        return self.wait().__await__()

    async def wait(self, *, timeout_s: float | None = None) -> Out:
        """`result`, for code on an event loop."""
        if timeout_s is None and self._client.is_synchronous:
            timeout_s = 0
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            head = await self.head()
            if head.status != "open":
                return await self._ended(head)
            remaining_s = WATCH_S if deadline is None else deadline - time.monotonic()
            if remaining_s <= 0:
                waits = "; ".join(f"{a.run_id} step {a.n} ({a.name}): {a.why}" for a in await self.waiting())
                raise TimeoutError(
                    f"run {self.run_id} has not ended after {timeout_s} s" + (f"; waiting: {waits}" if waits else "")
                )
            await self._journal.watch(self.run_id, version=None, timeout_s=min(remaining_s, WATCH_S))

    async def head(self) -> RunHead:
        """The run at a glance.

        Raises:
            RunError: there is no such run.
        """
        head = await self._journal.head(self.run_id)
        if head is None:
            raise RunError(
                f"there is no run {self.run_id!r}", hint="`agentmesh runs ls` lists them", run_id=self.run_id
            )
        return head

    async def _ended(self, head: RunHead) -> Out:
        (end,) = await self._journal.events(self.run_id, after=-1)
        if not isinstance(end, ENDS):  # a tolerant gather's late member was recorded after the end
            end = next(e for e in reversed(await self._journal.events(self.run_id)) if isinstance(e, ENDS))
        if isinstance(end, RunDone):
            crew = self._client.crew
            agent = crew.agents.get(head.agent) if crew is not None else None
            return cast(Out, from_json(end.value, agent.output) if agent is not None else end.value)
        if isinstance(end, Cancelled):
            raise RunCancelled(
                f"run {self.run_id} was cancelled{f' by {end.by}' if end.by else ''}", run_id=self.run_id
            )
        raise run_failure(self.run_id, end)

    # ---- what happens --------------------------------------------------------------------------
    @property
    def status(self) -> Literal["open", "done", "failed", "cancelled"]:
        """open, done, failed or cancelled."""
        return self._client.run_sync(self.head()).status

    def events(self) -> list[Event]:
        """The journal so far."""
        return self._client.run_sync(self._journal.events(self.run_id))

    async def __aiter__(self) -> AsyncIterator[Event]:
        seen = 0
        while True:
            new = await self._journal.events(self.run_id, after=seen)
            for event in new:
                yield event
            seen += len(new)
            if any(isinstance(e, ENDS) for e in new):
                return
            await self._journal.watch(self.run_id, version=seen, timeout_s=WATCH_S)

    def tokens(self) -> Iterator[str]:
        """The text of the tree's model calls as it comes, of the run's own steps alone."""
        stream = self.live()
        try:
            while True:
                token = self._client.run_sync(_next_token(stream))
                if token is None:
                    return
                if token.kind == "text" and token.run_id == self.run_id:
                    yield token.text
        finally:
            self._client.run_sync(_close_stream(stream))

    def live(self) -> AsyncIterator[Token]:
        """Everything said live in the run's tree: text, progress, retractions; each with run, step and attempt."""
        return self._journal.tokens(self.run_id)

    @property
    def messages(self) -> list[Message]:
        """The conversation, for `history=` of another run."""
        return self._client.run_sync(self._messages())

    async def _messages(self) -> list[Message]:
        history = History(self.run_id, await self._journal.events(self.run_id))
        if history.started is None:
            raise RunError(f"there is no run {self.run_id!r}", run_id=self.run_id)
        if self._client.crew is None:
            raise RunError(f"the messages of run {self.run_id} need the code of its crew", run_id=self.run_id)
        agent = self._client.crew.agent(history.started.agent, dict(history.started.fields))
        return list(replay(agent, history).messages)

    async def stuck(self) -> list[Approval]:
        """`waiting`, when nothing else of the tree moves any more; empty while something does."""
        entries = await self._journal.open_entries(self.run_id)
        return [] if entries.moving else [_approval(entry) for entry in entries.waiting]

    # ---- human decisions -----------------------------------------------------------------------
    @property
    def waiting_for(self) -> list[Approval]:
        """What is waiting for a decision in the whole tree."""
        return self._client.run_sync(self.waiting())

    async def waiting(self) -> list[Approval]:
        """`waiting_for`, for code on an event loop."""
        return [_approval(entry) for entry in (await self._journal.open_entries(self.run_id)).waiting]

    def approve(self, item: Approval, *, by: str = "") -> None:
        """Approve a waiting step."""
        self._client.run_sync(self._client.signal(item.run_id, Approved(n=item.n, by=by)))

    def deny(self, item: Approval, *, by: str = "", reason: str = "") -> None:
        """Deny a waiting step; the reason goes to whoever asked for it, including a model."""
        self._client.run_sync(self._client.signal(item.run_id, Denied(n=item.n, by=by, reason=reason)))

    def resolve(
        self, item: Approval, action: Literal["done", "failed", "retry"], *, value: Any = None, by: str = ""
    ) -> None:
        """Resolve a step in doubt."""
        self._client.run_sync(
            self._client.signal(item.run_id, StepResolved(n=item.n, action=action, value=value, by=by))
        )

    def revive(self, item: Approval, *, by: str = "") -> None:
        """Release a quarantined step or a blocked run."""
        self._client.run_sync(self._client.signal(item.run_id, StepRevived(n=item.n, by=by)))

    def raise_limits(self, limits: Mapping[str, float], *, by: str = "") -> None:
        """Raise the run's limits: `raise_limits({"turns": 50})`."""
        self._client.run_sync(self._client.signal(self.run_id, LimitRaised(limits=dict(limits), by=by)))

    def cancel(self, *, by: str = "") -> None:
        """End the run and everything below it; what is running stops at its next token or renewal."""
        self._client.run_sync(self._client.signal(self.run_id, Cancelled(by=by)))

    def retry(self) -> "Run[Out]":
        """Do an ended run's last, failed steps again, in a run `ID~2` (then `~3`) that begins with all that was done.

        Nothing that ended well is done or paid again, sub-agents' steps included; limits are counted from zero.

        Raises:
            RunError: the run is open or done, or a sub-agent's.
        """
        return Run(self._client.run_sync(self._client.retry(self.run_id)), self._client)


def run_failure(run_id: str, end: Failed) -> RunError:
    """RunFailed's error as an exception: a RunError as itself, anything else as its cause."""
    cause = error_from_json(end.error)
    if isinstance(cause, RunError):
        return cause
    where = f" in step {cause.n}" if isinstance(cause, StepError) and cause.n else ""
    kind = end.error["type"]
    message = message_of(end.error)
    return RunFailed(
        f"run {run_id} failed{where}: {message if kind in message else f'{kind}: {message}'}", run_id=run_id, cause=kind
    )


async def _next_token(stream: AsyncIterator[Token]) -> Token | None:
    return await anext(stream, None)


async def _close_stream(stream: AsyncIterator[Token]) -> None:
    if hasattr(stream, "aclose"):
        await stream.aclose()
