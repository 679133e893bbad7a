"""The live stream of one attempt: tokens and progress, gathered and sent together each 30 ms. Never the journal."""

import asyncio
import threading
from typing import Literal

from agentmesh.journal.journal import Journal
from agentmesh.journal.types import Token
from agentmesh.model import Thought

FLUSH_S = 0.03


class TokenBuffer:
    """Collects what an attempt says and passes it on; thread-safe towards its speakers.

    Made on the event loop that `flush` runs on.
    """

    def __init__(self, journal: Journal, run_id: str, n: int, attempt: int) -> None:
        self._journal, self._run_id, self._n, self._attempt = journal, run_id, n, attempt
        self._pending: list[Token] = []
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._flushing: asyncio.Task[None] | None = None

    def text(self, piece: str) -> None:
        """A piece of the model's text, or of its reasoning."""
        self._add("thought" if isinstance(piece, Thought) else "text", piece)

    def progress(self, line: str) -> None:
        """A line of a tool's progress."""
        self._add("progress", line)

    def retract(self) -> None:
        """What an earlier attempt of the step said is void."""
        self._add("retract", "")

    def _add(self, kind: Literal["text", "thought", "progress", "retract"], text: str) -> None:
        with self._lock:
            first = not self._pending
            self._pending.append(Token(self._run_id, self._n, self._attempt, kind, text))
        if first:
            self._loop.call_soon_threadsafe(self._schedule_flush)

    def _schedule_flush(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = self._loop.create_task(self._flush_soon())

    async def _flush_soon(self) -> None:
        # all attempts of the process at the same ticks: what they send is then one exchange with the server
        await asyncio.sleep(FLUSH_S - self._loop.time() % FLUSH_S)
        await self._send()

    async def _send(self) -> None:
        with self._lock:
            tokens, self._pending = self._pending, []
        if tokens:
            await self._journal.stream(self._run_id, tokens)

    async def flush(self) -> None:
        """Send what is left."""
        if self._flushing is not None:
            self._flushing.cancel()
        if self._pending:
            await self._send()
