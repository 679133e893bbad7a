"""The live stream of one attempt: tokens and progress, collected and sent together every few milliseconds. Never the journal."""

import asyncio
import logging
import threading
from contextlib import suppress
from typing import Literal
from weakref import WeakSet

from agentmesh.journal.journal import Journal
from agentmesh.journal.types import Token
from agentmesh.model import Thought

log = logging.getLogger("agentmesh")
# The time between two sends grows with the attempts that stream: a busy process sends fewer and larger pieces.
MIN_FLUSH_S, FLUSH_S_PER_ATTEMPT, MAX_FLUSH_S = 0.01, 0.0002, 0.25
_STREAMING: "WeakSet[TokenBuffer]" = WeakSet()  # of this process: those that have sent something and have not ended


def flush_interval_s() -> float:
    """The time between two sends of an attempt, for as many attempts as stream in this process now."""
    return min(MAX_FLUSH_S, max(MIN_FLUSH_S, FLUSH_S_PER_ATTEMPT * len(_STREAMING)))


class TokenBuffer:
    """Collects the tokens of an attempt and sends them to the journal's live stream; `text` and `progress` are thread-safe.

    The first ones are sent at once, later ones together with those of the process's other attempts. What the journal
    does not take is lost and logged: the live stream never decides what becomes of a step.

    Made on the event loop that `flush` runs on.
    """

    def __init__(self, journal: Journal, run_id: str, n: int, attempt: int) -> None:
        self._journal, self._run_id, self._n, self._attempt = journal, run_id, n, attempt
        self._pending: list[Token] = []
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._flushing: asyncio.Task[None] | None = None
        self._has_ended = False
        self._ended: asyncio.Event | None = None  # of an attempt that streams: nothing waits for the next tick any more
        self._has_failed = False

    def text(self, piece: str) -> None:
        """A piece of the model's text, or of its reasoning."""
        self._add("thought" if isinstance(piece, Thought) else "text", piece)

    def progress(self, line: str) -> None:
        """A line of a tool's progress."""
        self._add("progress", line)

    def retract(self) -> None:
        """What an earlier attempt of the step sent is void."""
        self._add("retract", "")

    def _add(self, kind: Literal["text", "thought", "progress", "retract"], text: str) -> None:
        with self._lock:
            first = not self._pending
            self._pending.append(Token(self._run_id, self._n, self._attempt, kind, text))
        if first:
            self._loop.call_soon_threadsafe(self._schedule_flush)

    def _schedule_flush(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = self._loop.create_task(self._flush_until_empty())

    async def _flush_until_empty(self) -> None:
        if self._ended is None:
            self._ended = asyncio.Event()
            if self._has_ended:
                self._ended.set()
            else:
                _STREAMING.add(self)
            await self._send()
        # Also what was added during a send: it has started no task of its own, since this one was running.
        while self._pending:
            await self._wait_for_tick()
            await self._send()

    async def _wait_for_tick(self) -> None:
        """All attempts of the process send at the same times, so that it is one exchange with the server."""
        assert self._ended is not None
        interval_s = flush_interval_s()
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s - self._loop.time() % interval_s):
                await self._ended.wait()

    async def _send(self) -> None:
        with self._lock:
            tokens, self._pending = self._pending, []
        if not tokens:
            return
        try:
            await self._journal.stream(self._run_id, tokens)
        except Exception as e:
            if not self._has_failed:
                log.warning("run %s step %d: live tokens could not be sent: %s", self._run_id, self._n, e)
            self._has_failed = True

    async def flush(self) -> None:
        """Send what is left, after the send that is under way. The attempt has ended."""
        self._has_ended = True
        if self._ended is not None:
            _STREAMING.discard(self)
            self._ended.set()
        if self._flushing is not None:
            await asyncio.shield(self._flushing)  # who cancels this must not cut off a send that is half done
        if self._pending:
            await self._send()
