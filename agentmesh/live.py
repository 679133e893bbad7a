"""The live stream of one attempt: tokens and progress, gathered and sent together each 30 ms. Never the journal."""

import asyncio
import threading
from typing import Literal

from agentmesh.journal import Journal
from agentmesh.model import Thought
from agentmesh.ports import Token

FLUSH_S = 0.03


class Live:
    """Collects what an attempt says and passes it on; thread-safe towards its speakers.

    Made on the event loop that `flush` runs on.
    """

    def __init__(self, journal: Journal, run_id: str, n: int, attempt: int) -> None:
        self._journal, self._run_id, self._n, self._attempt = journal, run_id, n, attempt
        self._said: list[Token] = []
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._flushing: asyncio.Task[None] | None = None

    def text(self, piece: str) -> None:
        """A piece of the model's text, or of its reasoning."""
        self._say("thought" if isinstance(piece, Thought) else "text", piece)

    def progress(self, line: str) -> None:
        """A line of a tool's progress."""
        self._say("progress", line)

    def retract(self) -> None:
        """What an earlier attempt of the step said is void."""
        self._say("retract", "")

    def _say(self, kind: Literal["text", "thought", "progress", "retract"], text: str) -> None:
        with self._lock:
            first = not self._said
            self._said.append(Token(self._run_id, self._n, self._attempt, kind, text))
        if first:
            self._loop.call_soon_threadsafe(self._later)

    def _later(self) -> None:
        if self._flushing is None or self._flushing.done():
            self._flushing = self._loop.create_task(self._flush_soon())

    async def _flush_soon(self) -> None:
        # all attempts of the process at the same ticks: what they send is then one exchange with the server
        await asyncio.sleep(FLUSH_S - self._loop.time() % FLUSH_S)
        await self._send()

    async def _send(self) -> None:
        with self._lock:
            said, self._said = self._said, []
        if said:
            await self._journal.stream(self._run_id, said)

    async def flush(self) -> None:
        """Send what is left."""
        if self._flushing is not None:
            self._flushing.cancel()
        if self._said:
            await self._send()
