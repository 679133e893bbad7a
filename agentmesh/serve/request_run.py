"""One request's run: begun or found by its key, waited for, streamed, and cancelled when its client has left."""

import asyncio
import contextlib
import hashlib
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.passthrough import Passthrough
from agentmesh.engine.async_run import Approval, AsyncRun
from agentmesh.engine.run_errors import run_error
from agentmesh.errors import MeshError, RunError
from agentmesh.journal.events import ENDS, Event, RunCancelled, RunDone, RunStarted, StepDone, StepPlanned
from agentmesh.journal.types import Token
from agentmesh.mesh import Mesh
from agentmesh.message import Message, Usage
from agentmesh.schema import canonical
from agentmesh.serve.request import ChatTarget
from agentmesh.serve.responses import ApiError, RunOutcome, api_error_of

POLL_S = 1.0  # how often an open run is asked whether it is waiting for a decision
BLOCKED_POLLS = 2  # consecutive ones; between two entries a run may seem blocked for a moment
CANCELLED_BY_CLIENT = "its client"  # who cancels the run of a client that left


class RequestRun:
    """One request's run.

    Args:
        key: the request's Idempotency-Key; "" is a run of its own.
        stream: whether the client reads the answer as it comes.
        origin: the crew file, for `agentmesh runs resume`.
        waiting: how many requests wait for each run, of the whole endpoint.

    Attributes:
        run_id: of the run, or of the retry that continues it.
        is_keyed: whether the client can ask for the same run again.
    """

    def __init__(
        self, mesh: Mesh, target: ChatTarget, *, key: str, stream: bool, origin: str, waiting: Counter[str]
    ) -> None:
        self._mesh, self._target, self._stream, self._origin = mesh.aio, target, stream, origin
        self._first_id = keyed_run(mesh.crew.name, key) if key else uuid.uuid4().hex[:12]
        self.run_id, self.is_keyed = self._first_id, bool(key)
        agent = target.agent
        # What the model says is the answer, unless a flow makes it, or it is JSON that may be invalid.
        self._streams_answer = isinstance(agent, Passthrough) or (
            type(agent).flow is Agent.flow and agent.output is str
        )
        self._is_late = False  # the run was begun by an earlier request: what it streamed may be void by now
        self._waiting = waiting
        waiting[self._first_id] += 1

    @property
    def _run(self) -> AsyncRun[Any]:
        return self._mesh.get(self.run_id)

    # ---- its beginning -------------------------------------------------------------------------
    async def begin(self) -> None:
        """Begin the run, or find the one that this key has begun before; one that was cancelled is retried.

        Raises:
            ApiError: the key was used for another request, or the task is not what the agent takes.
        """
        try:
            if self.is_keyed and (events := await self._mesh.get(self._first_id).events()):
                self._check_same_request(events[0])
                self._is_late = not await self._use_latest()
                return
            await self._mesh.start(
                self._target.agent, self._target.task, run_id=self.run_id, history=self._target.history,
                stream=self._stream, origin=self._origin,
            )  # fmt: skip
        except RunError as e:
            raise self._key_reused(e) from None
        except MeshError as e:
            raise api_error_of(e) from None

    def _check_same_request(self, started: Event) -> None:
        assert isinstance(started, RunStarted)
        agent, task = self._target.agent.on(self._target.task).child()
        history = [m.to_json() for m in self._target.history]
        if (agent.name, task, history) != (started.agent, started.task, started.history):
            raise self._key_reused(None)

    async def _use_latest(self) -> bool:
        """Turn to the newest retry of the run; True where that was cancelled, so that another begins."""
        first = self._mesh.get(self._first_id)
        self.run_id = (await first.latest()).run_id
        if await self._run.status() != "cancelled":
            return False
        try:
            self.run_id = (await first.retry()).run_id
        except RunError:  # unless another request that waits for it was quicker
            self.run_id = (await first.latest()).run_id
            if await self._run.status() == "cancelled":
                raise
        return True

    def _key_reused(self, error: RunError | None) -> ApiError:
        message = "this Idempotency-Key was used for another request; use another key" if self.is_keyed else str(error)
        return ApiError(422, message, "idempotency_key_reused", param="Idempotency-Key" if self.is_keyed else "")

    # ---- its end -------------------------------------------------------------------------------
    async def outcome(self) -> RunOutcome:
        """What the run came to, once it has ended.

        Another server cannot know who waits here: when its client leaves it cancels the run, and this one retries it.

        Raises:
            ApiError: it ended without a value, or waits for a decision.
        """
        try:
            await self._wait()
            while self.is_keyed and await self._was_left():
                await self._use_latest()
                await self._wait()
            return await self._read_outcome()
        except MeshError as e:
            raise api_error_of(e) from None

    async def _wait(self) -> None:
        polls = 0
        while not await self._run.wait(timeout_s=POLL_S):
            items = await self._run.blocked_on()
            polls = polls + 1 if items else 0
            if polls >= BLOCKED_POLLS:
                raise self._waits_for(items)

    async def _was_left(self) -> bool:
        """Whether a client that left has cancelled it."""
        if await self._run.status() != "cancelled":
            return False
        return any(isinstance(e, RunCancelled) and e.by == CANCELLED_BY_CLIENT for e in await self._run.events())

    def _waits_for(self, items: Sequence[Approval]) -> ApiError:
        what = "; ".join(f"{a.run_id} step {a.n} ({a.name}): {a.why}" for a in items)
        then = (
            "send it again with the same Idempotency-Key" if self.is_keyed else f"see agentmesh runs show {self.run_id}"
        )
        return ApiError(
            409, f"run {self.run_id} is waiting for a decision: {what}; decide with `agentmesh runs`, then {then}",
            "run_waiting", retryable=False,
        )  # fmt: skip

    async def _read_outcome(self) -> RunOutcome:
        events = await self._run.events()
        end = next(e for e in reversed(events) if isinstance(e, ENDS))
        if not isinstance(end, RunDone):
            raise run_error(self.run_id, end)
        usage = await self._usage(events)
        answer = _last_answer(events)
        if isinstance(self._target.agent, Passthrough) and answer is not None:
            message = Message.from_json(answer.value)
            return RunOutcome(message.text, message.tool_calls, usage, bool(answer.finish))
        text = end.value if isinstance(end.value, str) else canonical(end.value)
        return RunOutcome(text, (), usage, self._streams_answer and answer is not None and bool(answer.finish))

    async def _usage(self, events: Sequence[Event]) -> Usage:
        """What the model calls of the whole tree used; `events` are the run's own."""
        if any(isinstance(e, StepPlanned) and e.lane == "child" for e in events):
            events = [event for _, event in await self._run.tree_events()]
        return _sum_usage(events)

    # ---- what it says --------------------------------------------------------------------------
    async def pieces(self) -> AsyncGenerator[tuple[str, str] | RunOutcome, None]:
        """The answer as it comes, each piece with its kind, `text` or `thought`; then the outcome.

        Together the texts are the outcome's, or for an agent that spoke between its tool calls, all its turns with an
        empty line between.

        Raises:
            ApiError: as `outcome`; or what was sent is void, because an attempt failed after it had spoken.
        """
        items: asyncio.Queue[Any] = asyncio.Queue()
        work = [asyncio.create_task(_put_outcome(items, self.outcome()))]
        if self._streams_answer and not self._is_late:
            work.append(asyncio.create_task(_put_tokens(items, self._run)))
        sent: dict[int, str] = defaultdict(str)
        try:
            while not isinstance(item := await items.get(), RunOutcome):
                if isinstance(item, Exception):
                    raise item
                for piece in self._pieces_of(item, sent):
                    yield piece
            async for text in self._rest(item, sent):
                yield "text", text
            yield item
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    def _pieces_of(self, token: Token, sent: dict[int, str]) -> list[tuple[str, str]]:
        """What a token adds to the stream; `sent` is the text so far, by step."""
        if token.run_id != self.run_id:
            return []
        if token.kind == "retract" and sent.get(token.n):
            raise self._void()
        if token.kind == "thought":  # beside the answer: those of a retry only add to it
            return [("thought", token.text)]
        if token.kind != "text":
            return []
        gap = [("text", "\n\n")] if sent and token.n not in sent else []
        sent[token.n] += token.text
        return [*gap, ("text", token.text)]

    async def _rest(self, outcome: RunOutcome, sent: Mapping[int, str]) -> AsyncIterator[str]:
        """What the live stream had not brought when the run ended; the journal has all of it."""
        answer = _last_answer(await self._run.events())
        n = answer.n if answer is not None else 0
        sent_text = sent.get(n, "")
        if not outcome.text.startswith(sent_text):
            raise self._void()
        if sent and n not in sent and outcome.text:
            yield "\n\n"
        if rest := outcome.text[len(sent_text) :]:
            yield rest

    def _void(self) -> ApiError:
        then = "send it again with the same Idempotency-Key for the answer" if self.is_keyed else "send it again"
        return ApiError(
            502, f"an attempt failed after output was sent, so what was sent is void; {then}", "retried", retryable=True
        )

    # ---- the client has left -------------------------------------------------------------------
    def close(self) -> bool:
        """This request is over; True when no other request waits for the run."""
        self._waiting[self._first_id] -= 1
        if self._waiting[self._first_id] > 0:
            return False
        del self._waiting[self._first_id]
        return True

    async def cancel(self, by: str) -> None:
        """Cancel the run, or the retry that continues it."""
        with contextlib.suppress(MeshError):  # it has ended, or was never begun
            await self._run.cancel(by=by)


def keyed_run(crew: str, key: str) -> str:
    """The run of an Idempotency-Key; endpoints of several crews may share a journal."""
    of_crew = hashlib.sha256(crew.encode()).digest()
    return f"http-{hashlib.blake2b(key.encode(), key=of_crew, digest_size=16).hexdigest()}"


async def _put_outcome(items: "asyncio.Queue[Any]", outcome: Coroutine[Any, Any, RunOutcome]) -> None:
    try:
        items.put_nowait(await outcome)
    except Exception as e:
        items.put_nowait(e)


async def _put_tokens(items: "asyncio.Queue[Any]", run: AsyncRun[Any]) -> None:
    with contextlib.suppress(MeshError):  # the outcome reports it too
        async for token in run.live():
            items.put_nowait(token)


def _last_answer(events: Sequence[Event]) -> StepDone | None:
    """The end of the run's last Ask."""
    asks = {e.n for e in events if isinstance(e, StepPlanned) and e.kind == "Ask"}
    return next((e for e in reversed(events) if isinstance(e, StepDone) and e.n in asks), None)


def _sum_usage(events: Sequence[Event]) -> Usage:
    total = Usage()
    for event in events:
        total += Usage.from_json(getattr(event, "usage", None) or {})
    return total
