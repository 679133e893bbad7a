"""A handle to one run, for plain code: AsyncRun's words as calls that wait."""

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

from agentmesh.engine.async_run import Approval, AsyncRun, Resolution, RunClient, Status
from agentmesh.engine.blocking import refuse_method
from agentmesh.journal.events import Event
from agentmesh.journal.types import RunHead, Token
from agentmesh.message import Message

Out = TypeVar("Out")
T = TypeVar("T")
P = ParamSpec("P")


class Run(Generic[Out]):
    """A handle to one run: its result, events and tokens; approve, cancel, retry.

    Each call waits for the journal and needs a thread without a running event loop; on one, use `run.aio`.

    Attributes:
        aio: the same run with the same words to await.
        run_id: its id, which any process can look it up by.
    """

    def __init__(self, aio: AsyncRun[Out]) -> None:
        self.aio, self.run_id = aio, aio.run_id

    def __repr__(self) -> str:
        return f"Run({self.run_id!r})"

    # ---- the end -------------------------------------------------------------------------------
    def result(self, *, timeout_s: float | None = None) -> Out:
        """The run's value, once it has one.

        Raises:
            RunFailedError, RunCancelledError, LimitReached: it ended without one.
            TimeoutError: it has not ended in time; it continues.
        """
        return self._call(self.aio.result, timeout_s=timeout_s)

    def wait(self, *, timeout_s: float | None = None) -> bool:
        """Whether the run has ended; returns when it has, or after `timeout_s`."""
        return self._call(self.aio.wait, timeout_s=timeout_s)

    # ---- what happens --------------------------------------------------------------------------
    def status(self) -> Status:
        """open, done, failed or cancelled."""
        return self._call(self.aio.status)

    def head(self) -> RunHead:
        """The run at a glance: status, agent, turns, tokens, cost."""
        return self._call(self.aio.head)

    def events(self) -> list[Event]:
        """The journal so far."""
        return self._call(self.aio.events)

    def tree(self) -> "list[Run[Any]]":
        """The run and every run below it, parents before children."""
        return [Run(member) for member in self._call(self.aio.tree)]

    def tree_events(self) -> list[tuple[str, Event]]:
        """The journal so far of the run and every run below it, each event with its run's id: the run's own first, then by depth."""
        return self._call(self.aio.tree_events)

    def follow(self) -> Iterator[tuple[str, Event]]:
        """Each event of the tree with its run's id, until this run's end; parents before children."""
        return self._iterate(self.aio.follow)

    def live(self) -> Iterator[Token]:
        """Everything said live in the run's tree: text, progress, retractions; each with run, step and attempt."""
        return self._iterate(self.aio.live)

    def tokens(self) -> Iterator[str]:
        """The text of the run's own model calls as it comes."""
        return self._iterate(self.aio.tokens)

    def messages(self) -> list[Message]:
        """The conversation, for `history=` of another run."""
        return self._call(self.aio.messages)

    # ---- human decisions -----------------------------------------------------------------------
    def waiting_for(self) -> list[Approval]:
        """What is waiting for a decision in the whole tree."""
        return self._call(self.aio.waiting_for)

    def blocked_on(self) -> list[Approval]:
        """`waiting_for`, when nothing else of the tree moves; empty while something does."""
        return self._call(self.aio.blocked_on)

    def approve(self, item: Approval, *, by: str = "") -> None:
        """Approve a waiting step."""
        self._call(self.aio.approve, item, by=by)

    def deny(self, item: Approval, *, by: str = "", reason: str = "") -> None:
        """Deny a waiting step; the reason is passed to what requested the step, such as a model."""
        self._call(self.aio.deny, item, by=by, reason=reason)

    def resolve(self, item: Approval, action: Resolution, *, value: Any = None, by: str = "") -> None:
        """Resolve a step in doubt."""
        self._call(self.aio.resolve, item, action, value=value, by=by)

    def revive(self, item: Approval, *, by: str = "") -> None:
        """Release a quarantined step or a blocked run."""
        self._call(self.aio.revive, item, by=by)

    def raise_limits(self, limits: Mapping[str, float], *, by: str = "") -> None:
        """Raise the run's limits: `raise_limits({"turns": 50})`.

        Raises:
            DefinitionError: one is unknown, or not a number above 0.
        """
        self._call(self.aio.raise_limits, limits, by=by)

    def cancel(self, *, by: str = "") -> None:
        """End the run and everything below it; what is running stops at its next token or lease renewal."""
        self._call(self.aio.cancel, by=by)

    # ---- retries -------------------------------------------------------------------------------
    def retry(self) -> "Run[Out]":
        """Do an ended run's last, failed steps again, in a run `ID~2` (then `~3`) that begins with all that was done.

        Nothing that succeeded is done or paid again, steps of sub-agents included; limits are counted from zero.

        Raises:
            RunError: the run is open or done, or a sub-agent's.
        """
        return Run(self._call(self.aio.retry))

    def latest(self) -> "Run[Out]":
        """The newest retry of this run; itself where it was never retried."""
        return Run(self._call(self.aio.latest))

    # ---- parts ---------------------------------------------------------------------------------
    def _call(self, method: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        refuse_method("run", method, args, kwargs)
        return self.aio.client.run_sync(method(*args, **kwargs))

    def _iterate(self, method: Callable[[], AsyncGenerator[T, None]]) -> Iterator[T]:
        refuse_method("run", method, (), {})
        return _items(self.aio.client, method())


def _items(client: RunClient, stream: AsyncGenerator[T, None]) -> Iterator[T]:
    if client.is_synchronous:  # nothing new comes while the caller looks at an item
        yield from client.run_sync(_collect(stream))
        return
    try:
        while (batch := client.run_sync(_next(stream))) is not None:
            yield batch[0]
    finally:
        client.run_sync(_close(stream))


async def _collect(stream: AsyncGenerator[T, None]) -> list[T]:
    return [item async for item in stream]


async def _next(stream: AsyncGenerator[T, None]) -> tuple[T] | None:
    """The next item in a tuple; None at the end."""
    async for item in stream:
        return (item,)
    return None


async def _close(stream: AsyncGenerator[T, None]) -> None:
    await stream.aclose()
