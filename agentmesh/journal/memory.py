"""A journal in this process's memory: the protocol over Tables, one verb at a time. For tests and eager runs."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from agentmesh.journal.codec import Reply, VerbJournal, decode_event
from agentmesh.journal.events import Event
from agentmesh.journal.maintenance import ALL_VERBS
from agentmesh.journal.transaction import Tables, Transaction
from agentmesh.journal.tree import entries_from_lines, new_events, open_entries
from agentmesh.journal.types import JournalCounts, OpenEntries, OutboxMessage, RunHead, Token


class MemoryJournal(VerbJournal):
    """A Journal that lives as long as its process; thread-safe.

    Args:
        clock: the store's time in milliseconds.
        send: called with each message to publish, after the verb that wrote it.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], int] | None = None,
        send: Callable[[OutboxMessage], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.tables = Tables()
        self._clock = clock or (lambda: int(time.time() * 1000))
        self._send = send or (lambda message: None)
        self._lock = threading.RLock()
        self._streams: dict[str, list[Token]] = {}

    async def _execute(self, verb: str, args: dict[str, Any]) -> Reply:
        with self._lock:
            store = Transaction(self.tables, self._clock())
            reply = ALL_VERBS[verb](store, args)
        for queue, prefix, seq, suffix in store.sent:
            self._send(OutboxMessage(queue, f"{prefix}{seq}{suffix}"))
        return reply

    async def events(self, run_id: str, *, after: int = 0) -> list[Event]:
        """See Journal."""
        with self._lock:
            return [decode_event(line) for line in self.tables.tail(f"ev:{run_id}", after)]

    async def head(self, run_id: str) -> RunHead | None:
        """See Journal."""
        with self._lock:
            head = dict(self.tables.hashes.get(f"run:{run_id}") or {})
        return RunHead.of(run_id, head) if head else None

    async def runs(self, *, limit: int = 50) -> list[RunHead]:
        """See Journal."""
        with self._lock:
            newest = sorted(self.tables.zsets["runs"].items(), key=lambda item: (-item[1], item[0]))[:limit]
            return [RunHead.of(run, dict(self.tables.hashes[f"run:{run}"])) for run, _ in newest]

    async def tree(self, run_id: str) -> list[str]:
        """See Journal."""
        with self._lock:
            members = self.tables.smembers(f"tree:{run_id.partition('/')[0]}")
        return [m for m in members if m == run_id or m.startswith(f"{run_id}/")]

    async def open_entries(self, run_id: str) -> OpenEntries:
        """See Journal."""
        with self._lock:
            entries = open_entries(self.tables, run_id)
        return entries_from_lines(*entries)

    async def new_events(self, versions: Mapping[str, int]) -> AsyncIterator[tuple[str, Sequence[Event]]]:
        """See Journal."""
        with self._lock:
            added = list(new_events(self.tables, versions))
        for run, lines in added:
            yield run, [decode_event(line) for line in lines]

    async def queued(self, queues: Sequence[str]) -> int:
        """See Journal."""
        with self._lock:
            return sum(len(self.tables.zsets[f"q:{queue}"]) for queue in queues)

    async def counts(self) -> JournalCounts:
        """See Journal."""
        with self._lock:
            z, now = self.tables.zsets, self._clock()
            queues = {queue: len(z[f"q:{queue}"]) for queue in self.tables.smembers("queues")}
            expired, late = (sum(at <= now for at in z[key].values()) for key in ("leased", "due"))
            return JournalCounts(len(z["open"]), len(z["leased"]), len(z["due"]), len(z["held"]), queues, expired, late)

    async def stream(self, run_id: str, tokens: Sequence[Token]) -> None:
        """See Journal."""
        self._streams.setdefault(run_id.partition("/")[0], []).extend(tokens)

    async def tokens(self, run_id: str) -> AsyncIterator[Token]:
        """See Journal."""
        position, root = 0, run_id.partition("/")[0]
        while True:
            head = await self.head(root)
            new = self._streams.get(root, [])[position:]
            position += len(new)
            for token in new:
                yield token
            if not new and (head is None or head.status != "open"):
                return
            await asyncio.sleep(0.005)

    async def watch(self, run_id: str, *, version: int | None, timeout_s: float) -> None:
        """See Journal."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not self._has_changed(run_id, version):
            await asyncio.sleep(0.002)

    def _has_changed(self, run_id: str, version: int | None) -> bool:
        if version is None:
            return bool(self.tables.hget(f"run:{run_id}", "status") != "open")
        return self.tables.length(f"ev:{run_id}") > version

    async def close(self) -> None:
        """See Journal."""
