"""The journal in Redis 7 or Valkey: a Lua script for each verb, over one pipelined connection of each event loop.

Redis Cluster is not supported: a script touches keys of many runs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from redis.exceptions import NoScriptError

from agentmesh.errors import JournalError
from agentmesh.journal.codec import (
    LARGE_BYTES,
    Reply,
    VerbJournal,
    decode_event,
    extract_large,
    fingerprint_of,
    restore,
)
from agentmesh.journal.events import Event
from agentmesh.journal.redis_connection import RedisConnection, clean_url
from agentmesh.journal.redis_tree import fill_missing_plans, read_new_events, read_open_entries
from agentmesh.journal.run_end_listener import RunEndListener
from agentmesh.journal.scripts import script
from agentmesh.journal.streams import StreamListener
from agentmesh.journal.tree import entries_from_lines
from agentmesh.journal.types import JournalCounts, OpenEntries, OutboxMessage, RunHead, Token
from agentmesh.schema import dumps, loads

LIVE_ENTRIES = 10_000  # of a tree's live stream; older ones are dropped
MIN_WATCH_S, MAX_WATCH_S = 0.005, 0.25  # between two checks whether a run has new events
END_POLL_S = 5.0  # between two checks whether a run has ended, in case its notification was lost


class RedisJournal(VerbJournal):
    """A Journal on a Redis or Valkey server (one node, any number of replicas).

    Args:
        url: redis://, rediss:// or unix://.
        prefix: of every key.
        push: the broker is this server and database, so the scripts push the messages themselves.
        send: gets the messages that are not pushed.
        clock: for tests: milliseconds instead of the server's time.
        patience_s: how long a verb waits for an unreachable server before it fails.
    """

    def __init__(
        self, url: str, *, prefix: str = "agentmesh:", push: bool = True, send: Callable[[OutboxMessage], None] | None = None,
        clock: Callable[[], int] | None = None, patience_s: float = 60.0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self.url, self.prefix, self._push, self._send, self._clock = clean_url(url), prefix, push, send, clock
        self._patience_s = patience_s
        self._connections: WeakKeyDictionary[asyncio.AbstractEventLoop, RedisConnection] = WeakKeyDictionary()
        self._end_listeners: WeakKeyDictionary[asyncio.AbstractEventLoop, RunEndListener] = WeakKeyDictionary()
        self._stream_listeners: WeakKeyDictionary[asyncio.AbstractEventLoop, StreamListener] = WeakKeyDictionary()

    # ---- verbs ---------------------------------------------------------------------------------
    @property
    def connection(self) -> RedisConnection:
        """The running loop's connection."""
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            self._connections[loop] = RedisConnection(self.url, patience_s=self._patience_s)
        return self._connections[loop]

    @property
    def _run_ends(self) -> RunEndListener:
        loop = asyncio.get_running_loop()
        if loop not in self._end_listeners:
            self._end_listeners[loop] = RunEndListener(self.url, f"{self.prefix}ended")
        return self._end_listeners[loop]

    @property
    def _streams(self) -> StreamListener:
        loop = asyncio.get_running_loop()
        if loop not in self._stream_listeners:
            self._stream_listeners[loop] = StreamListener(self.url, self.connection)
        return self._stream_listeners[loop]

    @property
    def pushes(self) -> bool:
        """Whether the broker's lists are in this database, so that the scripts write them."""
        return self._push

    @property
    def epoch(self) -> int:
        """How often the running loop's connection was made: a server that restarted is a new one."""
        return self.connection.connected

    async def _execute(self, verb: str, args: dict[str, Any]) -> Reply:
        run_id = args.get("run") or str(args.get("unit", "||")).split("|")[1]
        text = dumps(args)
        if len(text) * 4 > LARGE_BYTES:  # most verbs are small and need no search for large values
            for fingerprint, large in list(extract_large(args)):
                await self._store_blob(run_id, fingerprint, large)
            text = dumps(args)
        now = str(self._clock()) if self._clock else ""
        reply = await self._evaluate(verb, text, now, "1" if self._push else "0")
        head, count = loads(reply[0]), reply[1]
        if self._send is not None:
            for queue, body in zip(reply[2 + count :: 2], reply[3 + count :: 2], strict=True):
                self._send(OutboxMessage(queue, body))
        lines = reply[2 : 2 + count]
        return head, await self._restore_blobs(lines, run_id) if verb in ("claim", "plan") else lines

    async def _evaluate(self, name: str, *arguments: Any) -> Any:
        """The reply of a script."""
        text, sha = script(name)
        try:
            return await self.connection.ask("EVALSHA", sha, 1, self.prefix, *arguments)
        except NoScriptError:
            return await self.connection.ask("EVAL", text, 1, self.prefix, *arguments)

    # ---- blobs ---------------------------------------------------------------------------------
    def _key(self, *parts: str) -> str:
        return self.prefix + ":".join(parts)

    async def _store_blob(self, run_id: str, fingerprint: str, text: str) -> None:
        """Store a large value before the event that names it. Without such an event it is deleted with its tree."""
        root = run_id.partition("/")[0]
        key = self._key("blob", root, fingerprint)
        await asyncio.gather(
            self.connection.ask("SET", key, text), self.connection.ask("SADD", self._key("blobs", root), key)
        )

    async def _restore_blobs(self, lines: list[str], run_id: str) -> list[str]:
        """The lines with their large values in place.

        Raises:
            JournalError: a large value is missing.
        """
        marks = {i: mark for i, line in enumerate(lines) if (mark := fingerprint_of(line))}
        if not marks:
            return lines
        root = run_id.partition("/")[0]
        texts = await self.connection.ask("MGET", *[self._key("blob", root, mark) for mark in marks.values()])
        whole = list(lines)
        for i, text in zip(marks, texts, strict=True):
            if text is None:
                raise JournalError(
                    f"a large value of run {run_id} is missing from the journal's server",
                    hint="restore the keys that were deleted by hand, or cancel the run",
                )
            whole[i] = restore(lines[i], text)
        return whole

    # ---- reads ---------------------------------------------------------------------------------
    async def events(self, run_id: str, *, after: int = 0) -> list[Event]:
        """See Journal."""
        return [decode_event(line) for line in await self._restore_blobs(await self._lines(run_id, after), run_id)]

    async def _lines(self, run_id: str, after: int = 0) -> list[str]:
        lines: list[str] = await self.connection.ask("LRANGE", self._key("ev", run_id), after, -1)
        return lines

    async def head(self, run_id: str) -> RunHead | None:
        """See Journal."""
        head = _pairs(await self.connection.ask("HGETALL", self._key("run", run_id)))
        return RunHead.of(run_id, head) if head.get("status") else None

    async def runs(self, *, limit: int = 50) -> list[RunHead]:
        """See Journal."""
        newest = await self.connection.ask("ZRANGE", self._key("runs"), 0, limit - 1, "REV")
        heads = await asyncio.gather(*[self.head(run) for run in newest])
        return [h for h in heads if h is not None]

    async def tree(self, run_id: str) -> list[str]:
        """See Journal."""
        members = await self.connection.ask("SMEMBERS", self._key("tree", run_id.partition("/")[0]))
        return sorted(m for m in members if m == run_id or m.startswith(f"{run_id}/"))

    async def open_entries(self, run_id: str) -> OpenEntries:
        """See Journal."""
        moving, waiting = await read_open_entries(self._evaluate, run_id)
        waiting = await fill_missing_plans(waiting, self._lines)
        lines = await self._restore_blobs([line for *_, line in waiting], run_id)
        entries = [(run, key, why, line) for (run, key, why, _), line in zip(waiting, lines, strict=True)]
        return entries_from_lines(moving, entries)

    async def new_events(self, versions: Mapping[str, int]) -> AsyncIterator[tuple[str, Sequence[Event]]]:
        """See Journal."""
        async for runs in read_new_events(self._evaluate, versions):
            # all at once, so that what they lack is one exchange with the server
            restored = await asyncio.gather(*[self._restore_blobs(lines, run) for run, lines in runs])
            for (run, _), lines in zip(runs, restored, strict=True):
                yield run, [decode_event(line) for line in lines]

    async def queued(self, queues: Sequence[str]) -> int:
        """See Journal."""
        return sum(await asyncio.gather(*[self.connection.ask("ZCARD", self._key("q", queue)) for queue in queues]))

    async def counts(self) -> JournalCounts:
        """See Journal."""
        ask, key = self.connection.ask, self._key
        queues, snaps, (seconds, micros) = await asyncio.gather(
            ask("SMEMBERS", key("queues")), ask("HGETALL", key("qsnap")), ask("TIME")
        )
        now = int(seconds) * 1000 + int(micros) // 1000
        claimed = {queue: snapshot.split()[0] for queue, snapshot in _pairs(snaps).items()}
        sizes = [ask("ZCARD", key(name)) for name in ("open", "leased", "due", "held")]
        late = [ask("ZCOUNT", key(name), "-inf", now) for name in ("leased", "due")]
        waiting = [ask("ZCARD", key("q", queue)) for queue in queues]
        lost = [ask("ZCOUNT", key("q", q), "-inf", f"({claimed.get(q, 0)}") for q in queues]
        runs, leased, due, held = await asyncio.gather(*sizes)
        depth = dict(zip(queues, await asyncio.gather(*waiting), strict=True))
        expired, overslept = await asyncio.gather(*late)
        return JournalCounts(runs, leased, due, held, depth, expired, overslept, sum(await asyncio.gather(*lost)))

    # ---- live ----------------------------------------------------------------------------------
    async def stream(self, run_id: str, tokens: Sequence[Token]) -> None:
        """See Journal."""
        key = self._key("live", run_id.partition("/")[0])
        text = dumps([[t.run_id, t.n, t.attempt, t.kind, t.text] for t in tokens])
        await self.connection.ask("XADD", key, "MAXLEN", "~", LIVE_ENTRIES, "*", "t", text)

    async def tokens(self, run_id: str) -> AsyncIterator[Token]:
        """See Journal."""
        root = run_id.partition("/")[0]
        listener, ends = self._streams, self._run_ends
        reader = listener.join(self._key("live", root))
        try:
            ended = await ends.subscribe(root)
            try:
                while not _is_over(await self.head(root)):
                    while texts := await listener.next(reader, ended):
                        for token in _tokens(texts):
                            yield token
                    if ended.done():  # perhaps only because ends may have been missed: subscribe before the next look
                        ended = await ends.subscribe(root)
            finally:
                ends.leave(root, ended)
            for token in _tokens(await listener.rest(reader)):
                yield token
        finally:
            listener.leave(reader)

    async def watch(self, run_id: str, *, version: int | None, timeout_s: float) -> None:
        """See Journal."""
        loop, ends = asyncio.get_running_loop(), self._run_ends
        ended = await ends.subscribe(run_id)
        deadline, pause_s = loop.time() + timeout_s, MIN_WATCH_S
        try:
            while (remaining_s := deadline - loop.time()) > 0:
                if version is None:
                    if _is_over(await self.head(run_id)):  # it may have ended before the subscription
                        return
                elif await self.connection.ask("LLEN", self._key("ev", run_id)) > version:
                    return
                wait_s = min(remaining_s, END_POLL_S if version is None else pause_s)
                pause_s = min(MAX_WATCH_S, pause_s * 1.5)
                done, _ = await asyncio.wait([ended], timeout=wait_s)
                if done:
                    return
        finally:
            ends.leave(run_id, ended)

    async def close(self) -> None:
        """See Journal."""
        loop = asyncio.get_running_loop()
        for by_loop in (self._stream_listeners, self._end_listeners, self._connections):
            if (closing := by_loop.pop(loop, None)) is not None:
                await closing.close()
        if (flush := getattr(self._send, "close", None)) is not None:
            await asyncio.to_thread(flush)  # messages that it has not sent yet


def _pairs(reply: Any) -> dict[str, str]:
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _tokens(texts: Iterable[str]) -> Iterator[Token]:
    for text in texts:
        for token in loads(text):
            yield Token(*token)


def _is_over(head: RunHead | None) -> bool:
    return head is None or head.status != "open"
