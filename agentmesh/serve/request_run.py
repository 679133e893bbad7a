"""One request and its run: begun or taken up again, waited for, listened to, cancelled when nobody waits any more."""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.passthrough import Passthrough
from agentmesh.engine.retry import latest_retry
from agentmesh.engine.run import Approval, Run, run_failure
from agentmesh.errors import MeshError, RunError
from agentmesh.journal.events import ENDS, Event, RunCancelled, RunDone, RunFailed, RunStarted, StepDone, StepPlanned
from agentmesh.mesh import Mesh
from agentmesh.message import Message, Usage
from agentmesh.schema import canonical
from agentmesh.serve.responses import ApiError, RunOutcome, api_error_of

POLL_S = 1.0  # how often a run that has not ended is asked whether it is waiting for a decision
CANCELLED_BY_CLIENT = "its client"  # who cancels the run of a client that left
STUCK_LOOKS = 2  # between two entries nothing may seem to move for a moment


class RequestRun:
    """One request's run.

    Args:
        run_id: what the run is called, or the first of its line when the request comes again.
        keyed: whether the client can ask for the same run again.
        waiting: how many requests wait for each run, of the whole endpoint.
    """

    def __init__(
        self, mesh: Mesh, run_id: str, agent: Agent[Any, Any], task: Any, history: Sequence[Message], *, keyed: bool,
        stream: bool, origin: str, waiting: Counter[str],
    ) -> None:  # fmt: skip
        self._mesh, self._journal = mesh, mesh.journal
        self._agent, self._task, self._history = agent, task, history
        self._stream, self._origin = stream, origin
        self.run_id, self.keyed = run_id, keyed
        self._line, self._waiting = run_id, waiting
        # Where what the model says piece by piece is the answer: not of a flow of one's own, nor of JSON that may be wrong.
        self._spoken = isinstance(agent, Passthrough) or (type(agent).flow is Agent.flow and agent.output is str)
        self._heard = False  # it was there before: what was said so far may be void by now
        waiting[run_id] += 1

    @property
    def _run(self) -> Run[Any]:
        return self._mesh.get(self.run_id)

    # ---- its beginning -------------------------------------------------------------------------
    async def begin(self) -> None:
        """Begin the run, or find the one that this key has begun before; one that was cancelled goes on.

        Raises:
            Refusal: the key was used for something else, or the task is not what the agent takes.
        """
        try:
            if self.keyed and await self._journal.head(self._line) is not None:
                await self._take_up()
                return
            await self._mesh.begin(
                self._agent, self._task, id=self.run_id, history=self._history, stream=self._stream,
                origin=self._origin,
            )  # fmt: skip
        except RunError as e:
            raise self._other(e) from None
        except MeshError as e:
            raise api_error_of(e) from None

    async def _take_up(self) -> None:
        """What this key has begun before, here or at another server."""
        started = (await self._journal.events(self._line))[0]
        assert isinstance(started, RunStarted)
        request_key = self._agent.name, self._agent._task_json(self._task), [m.to_json() for m in self._history]
        if request_key != (started.agent, started.task, started.history):
            raise self._other(None)
        self._heard = not await self._go_on()

    async def _go_on(self) -> bool:
        """Turn to the newest of the line; True when it had been cancelled, so that a new one goes on from there."""
        last = await latest_retry(self._journal, self._line)
        self.run_id = last.id
        if last.status != "cancelled":
            return False
        try:
            self.run_id = await self._mesh.process_state.client.retry(self._line)
        except RunError:  # unless somebody else who waits for it was quicker
            last = await latest_retry(self._journal, self._line)
            if last.status == "cancelled":
                raise
            self.run_id = last.id
        return True

    def _other(self, error: RunError | None) -> ApiError:
        message = "this Idempotency-Key was used for another request; take another key" if self.keyed else str(error)
        return ApiError(422, message, "idempotency_key_reused", param="Idempotency-Key" if self.keyed else "")

    # ---- its end -------------------------------------------------------------------------------
    async def outcome(self) -> RunOutcome:
        """What the run came to, once it has.

        Another server cannot know who waits here: when its client leaves it cancels the run, and this one goes on with it.

        Raises:
            Refusal: it ended without a value, or waits for a person.
        """
        try:
            await self._ended()
            while self.keyed and await self._was_left():
                await self._go_on()
                await self._ended()
            return await self._came_to()
        except MeshError as e:
            raise api_error_of(e) from None

    async def _ended(self) -> None:
        looks = 0
        while True:
            await self._journal.watch(self.run_id, version=None, timeout_s=POLL_S)
            if (await self._run.head()).status != "open":
                return
            waits = await self._run.stuck()
            looks = looks + 1 if waits else 0
            if looks >= STUCK_LOOKS:
                raise self._waits(waits)

    async def _was_left(self) -> bool:
        """Whether a client that left has cancelled it."""
        if (await self._run.head()).status != "cancelled":
            return False
        events = await self._journal.events(self.run_id)
        return any(isinstance(e, RunCancelled) and e.by == CANCELLED_BY_CLIENT for e in events)

    def _waits(self, waits: Sequence[Approval]) -> ApiError:
        what = "; ".join(f"{a.run_id} step {a.n} ({a.name}): {a.why}" for a in waits)
        then = "ask again with the same Idempotency-Key" if self.keyed else f"see agentmesh runs show {self.run_id}"
        return ApiError(
            409, f"run {self.run_id} is waiting for a decision: {what}; decide with `agentmesh runs`, then {then}",
            "run_waiting", again=False,
        )  # fmt: skip

    async def _came_to(self) -> RunOutcome:
        events = await self._journal.events(self.run_id)
        end = next(e for e in reversed(events) if isinstance(e, ENDS))
        if isinstance(end, RunFailed):
            raise run_failure(self.run_id, end)
        if not isinstance(end, RunDone):
            raise ApiError(409, f"run {self.run_id} was cancelled{_cancelled_by(end)}", "run_cancelled", again=False)
        usage = await self._used(events)
        last = _last_answer(events)
        if isinstance(self._agent, Passthrough) and last is not None:
            message = Message.from_json(last.value)
            return RunOutcome(message.text, message.tool_calls, usage, bool(last.finish))
        text = end.value if isinstance(end.value, str) else canonical(end.value)
        return RunOutcome(text, (), usage, self._spoken and last is not None and bool(last.finish))

    async def _used(self, events: Sequence[Event]) -> Usage:
        """What the whole tree's model calls were counted at."""
        total = _sum(events)
        for member in await self._journal.tree(self.run_id):
            if member != self.run_id:
                total += _sum(await self._journal.events(member))
        return total

    # ---- what it says --------------------------------------------------------------------------
    async def pieces(self) -> AsyncGenerator[tuple[str, str] | RunOutcome, None]:
        """What is said as it comes, each piece with its kind, `text` or `thought`; then the outcome.

        Together the texts are the outcome's, or for an agent that spoke between its tool calls, all its turns with an
        empty line between.

        Raises:
            Refusal: as `outcome`; or what was given already is void, since an attempt failed after it had spoken.
        """
        news: asyncio.Queue[Any] = asyncio.Queue()
        work = [asyncio.create_task(_tell(news, self.outcome()))]
        if self._spoken and not self._heard:
            work.append(asyncio.create_task(_listen(news, self._run)))
        sent_texts: dict[int, str] = defaultdict(str)
        try:
            while True:
                item = await news.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, RunOutcome):
                    async for piece in self._rest(item, sent_texts):
                        yield "text", piece
                    yield item
                    return
                if item.run_id != self.run_id:
                    continue
                if item.kind == "retract" and sent_texts.get(item.n):
                    raise self._void()
                if item.kind == "thought":  # beside the answer: a retry's are only more of them
                    yield "thought", item.text
                if item.kind == "text":
                    if sent_texts and item.n not in sent_texts:
                        yield "text", "\n\n"
                    sent_texts[item.n] += item.text
                    yield "text", item.text
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _rest(self, outcome: RunOutcome, said: dict[int, str]) -> AsyncIterator[str]:
        """What the live stream had not brought when the run ended; the journal has it all."""
        last = _last_answer(await self._journal.events(self.run_id))
        n = last.n if last is not None else 0
        given = said.get(n, "")
        if not outcome.text.startswith(given):
            raise self._void()
        if said and n not in said and outcome.text:
            yield "\n\n"
        if rest := outcome.text[len(given) :]:
            yield rest

    def _void(self) -> ApiError:
        then = "ask again with the same Idempotency-Key for the answer" if self.keyed else "ask again"
        return ApiError(
            502, f"an attempt failed after output was sent, so what was sent is void; {then}", "retried", again=True
        )

    # ---- nobody waits any more -----------------------------------------------------------------
    def close(self) -> bool:
        """This request is over; True when nobody else waits for the run."""
        self._waiting[self._line] -= 1
        if self._waiting[self._line] > 0:
            return False
        del self._waiting[self._line]
        return True

    async def cancel(self, by: str) -> None:
        """End the run, wherever it is by now."""
        with contextlib.suppress(MeshError):  # it has ended, or was never begun
            await self._mesh.process_state.client.signal(self.run_id, RunCancelled(by=by))


async def _tell(news: "asyncio.Queue[Any]", outcome: Any) -> None:
    try:
        news.put_nowait(await outcome)
    except Exception as e:
        news.put_nowait(e)


async def _listen(news: "asyncio.Queue[Any]", run: Run[Any]) -> None:
    with contextlib.suppress(MeshError):  # the outcome says it too
        async for token in run.live():
            news.put_nowait(token)


def _last_answer(events: Sequence[Event]) -> StepDone | None:
    """The end of the run's last Ask."""
    asks = {e.n for e in events if isinstance(e, StepPlanned) and e.kind == "Ask"}
    return next((e for e in reversed(events) if isinstance(e, StepDone) and e.n in asks), None)


def _sum(events: Sequence[Event]) -> Usage:
    total = Usage()
    for event in events:
        total += Usage.from_json(getattr(event, "usage", None) or {})
    return total


def _cancelled_by(end: Event) -> str:
    by = getattr(end, "by", "")
    return f" by {by}" if by else ""
