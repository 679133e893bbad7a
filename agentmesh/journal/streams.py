"""The live streams of many runs, read by one blocking XREAD over one connection for each event loop.

Source: https://valkey.io/commands/xread/
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from redis.exceptions import ResponseError

from agentmesh.errors import JournalError, ServiceDown
from agentmesh.journal.redis_connection import (
    CONNECTION_LOST,
    RedisConnection,
    cancel_and_wait,
    explain_error,
    open_connection,
    start_task,
)

BLOCK_MS = 2_000  # of one read; less than the time after which a silent connection counts as lost
SHORT_BLOCK_MS = 100  # where the user may not unblock a read: a new stream waits for so long
ENTRIES_PER_READ = 500  # of each stream
MAX_PENDING = 1_000  # entries kept for a reader; later ones it reads from the server again
UNBLOCK_RETRY_S, RECONNECT_S = 0.005, 0.1
READER_POLL_S = 5.0  # a reader without new entries reads the stream itself so often


class StreamReader:
    """One reader's position in one stream, and the entries that have arrived for it. Made by `StreamListener.join`."""

    def __init__(self, key: str) -> None:
        self.key, self.position = key, "0"  # the id of the last entry it has
        self.pending: list[str] = []
        self.error: Exception | None = None
        self._waiting: asyncio.Future[None] | None = None

    def take(self) -> list[str]:
        """The entries that have arrived, in order.

        Raises:
            JournalError: the server refuses to read the stream.
        """
        if self.error is not None:
            raise self.error
        texts, self.pending = self.pending, []
        return texts

    def wake(self) -> None:
        """Wake the reader: an entry has arrived or can be read."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self, ended: "asyncio.Future[None]") -> None:
        """Return at the next `wake`, when `ended` is done, or after READER_POLL_S."""
        self._waiting = asyncio.get_running_loop().create_future()
        await asyncio.wait((self._waiting, ended), timeout=READER_POLL_S, return_when=asyncio.FIRST_COMPLETED)


class StreamListener:
    """All readers of one event loop. Each gets every entry of its stream once, from the first one on.

    The shared read never goes back. A reader that is behind it, because it joined late or was slow, reads the missing
    entries with XRANGE.

    Args:
        connection: of the event loop, for commands that do not block.
    """

    def __init__(self, url: str, connection: RedisConnection) -> None:
        self._url, self._connection = url, connection
        self._readers: dict[str, list[StreamReader]] = {}
        self._positions: dict[str, str] = {}  # of the shared read, by stream
        self._task: asyncio.Task[None] | None = None
        self._unblocking: asyncio.Task[None] | None = None
        self._client_id = 0
        self._is_blocked = False  # a read is under way
        self._reads = 0
        self._block_ms = BLOCK_MS

    def join(self, key: str) -> StreamReader:
        """Add a reader of a stream, at its beginning."""
        reader = StreamReader(key)
        is_new = key not in self._readers
        self._readers.setdefault(key, []).append(reader)
        if is_new:
            self._positions[key] = "0"
        if self._task is None or self._task.done():
            self._task = start_task(self._read_all())
        elif is_new:
            self._interrupt()
        return reader

    def leave(self, reader: StreamReader) -> None:
        """Remove a reader. After the last one the connection is closed."""
        readers = self._readers.get(reader.key, [])
        if reader in readers:
            readers.remove(reader)
        if not readers and self._readers.pop(reader.key, None) is not None:
            del self._positions[reader.key]
        if not self._readers:
            self._interrupt()

    async def next(self, reader: StreamReader, ended: "asyncio.Future[None]") -> list[str]:
        """The next entries, when they arrive; [] when `ended` is done or none has arrived for READER_POLL_S.

        Raises:
            JournalError: the server refuses to read the stream.
        """
        if not reader.pending and _order(reader.position) < _order(self._positions.get(reader.key, "0")):
            await self._catch_up(reader)
        if not reader.pending and reader.error is None:
            await reader.wait(ended)
        return reader.take()

    async def rest(self, reader: StreamReader) -> list[str]:
        """Remove the reader; all entries of the stream that it has not taken yet."""
        self.leave(reader)
        texts = reader.take()
        while await self._catch_up(reader):
            texts += reader.take()
        return texts

    async def _catch_up(self, reader: StreamReader) -> bool:
        """Read the entries behind the reader's position from the server; whether there was one."""
        first = "-" if reader.position == "0" else f"({reader.position}"
        entries = await self._connection.ask("XRANGE", reader.key, first, "+", "COUNT", ENTRIES_PER_READ)
        _put(reader, entries)
        return bool(entries)

    # ---- the shared read -----------------------------------------------------------------------
    async def _read_all(self) -> None:
        while self._readers:
            connection: Any = None
            try:
                connection = await open_connection(self._url)
                await self._ask_id(connection)
                while self._readers:
                    positions = dict(self._positions)
                    self._deliver(positions, await self._read(connection, positions))
            except CONNECTION_LOST:
                await asyncio.sleep(RECONNECT_S)
            except ResponseError as e:
                self._fail(explain_error(e))
            finally:
                self._is_blocked = False
                if connection is not None:
                    await connection.disconnect(nowait=True)

    async def _ask_id(self, connection: Any) -> None:
        await connection.send_command("CLIENT", "ID")
        try:
            self._client_id = await connection.read_response()
        except ResponseError:  # this user may not use CLIENT ID
            self._client_id, self._block_ms = 0, SHORT_BLOCK_MS

    async def _read(self, connection: Any, positions: Mapping[str, str]) -> Any:
        block_ms = self._block_ms
        if connection.socket_timeout:  # the URL may set one
            block_ms = min(block_ms, int(connection.socket_timeout * 500))
        self._is_blocked = True
        options = ("COUNT", str(ENTRIES_PER_READ), "BLOCK", str(block_ms))
        await connection.send_command("XREAD", *options, "STREAMS", *positions, *positions.values())
        reply = await connection.read_response()
        self._is_blocked, self._reads = False, self._reads + 1
        return reply

    def _deliver(self, positions: Mapping[str, str], reply: Any) -> None:
        # {key: entries} by RESP3, [[key, entries], …] by RESP2
        for key, entries in reply.items() if isinstance(reply, dict) else reply or ():
            before = _order(
                positions[key]
            )  # a stream may have been left and joined again since: then its reader is behind
            for reader in self._readers.get(key, ()):
                if _order(reader.position) >= before and len(reader.pending) < MAX_PENDING:
                    _put(reader, entries)
                reader.wake()  # one that is behind as well: it has entries to read
            if key in self._positions:
                self._positions[key] = entries[-1][0]

    def _fail(self, error: Exception) -> None:
        for readers in self._readers.values():
            for reader in readers:
                reader.error = error
                reader.wake()
        self._readers.clear()
        self._positions.clear()

    # ---- interrupting the shared read ----------------------------------------------------------
    def _interrupt(self) -> None:
        """End the blocked read, so that the next one begins with the current set of streams."""
        if self._is_blocked and self._client_id and (self._unblocking is None or self._unblocking.done()):
            self._unblocking = start_task(self._unblock(self._reads))

    async def _unblock(self, read: int) -> None:
        # The read is on another connection and may reach the server later: repeated until the server finds it blocked.
        while self._is_blocked and self._reads == read:
            try:
                if await self._connection.ask("CLIENT", "UNBLOCK", self._client_id):
                    return
            except ServiceDown:
                return  # the read has ended, too
            except JournalError:  # this user may not use CLIENT UNBLOCK
                self._block_ms = SHORT_BLOCK_MS
                return
            await asyncio.sleep(UNBLOCK_RETRY_S)

    async def close(self) -> None:
        """Close the connection; readers raise JournalError."""
        self._fail(JournalError("the journal was closed while its live stream was read"))
        await cancel_and_wait(self._unblocking)
        await cancel_and_wait(self._task)


def _put(reader: StreamReader, entries: list[Any]) -> None:
    """Add the entries that the reader does not have; each is `[id, [field, value]]`."""
    position = _order(reader.position)
    reader.pending += [fields[1] for entry_id, fields in entries if _order(entry_id) > position]
    if entries and _order(entries[-1][0]) > position:
        reader.position = entries[-1][0]


def _order(entry_id: str) -> tuple[int, int]:
    ms, _, n = entry_id.partition("-")
    return int(ms), int(n or 0)
