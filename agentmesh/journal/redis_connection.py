"""One pipelined connection: what is asked in one turn of the event loop is sent together and survives a lost server.

Every command given here must be repeatable: one whose reply was lost is sent again.
"""

import asyncio
import re
import time
from collections.abc import Awaitable
from typing import Any

from hiredis import pack_command
from redis.asyncio.connection import Connection, parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoScriptError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeout

from agentmesh.errors import JournalError, ServiceDown

CONNECTION_LOST = (ConnectionError, RedisTimeout, BusyLoadingError, OSError, EOFError)
FIRST_CONNECT_S = 3.0
RECONNECT_S, MAX_RECONNECT_S = 0.01, 0.5
REPLY_TIMEOUT_S = 5.0  # a link that says nothing for so long is dead, though nobody told us; less than a lease lasts
Pending = tuple[bytes, asyncio.Future[Any], float]  # the command as sent, its reply to come, until when to try


def clean_url(url: str) -> str:
    """A URL as redis-py reads it: kombu's `redis+socket` and `virtual_host` are translated."""
    url = url.replace("valkey://", "redis://", 1).replace("valkeys://", "rediss://", 1)
    return url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")


async def cancel_and_wait(task: "asyncio.Task[None] | None") -> None:
    """Cancel a task until it has ended: redis-py may swallow a cancellation while it connects again."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.05)


async def cancellable(reading: Awaitable[Any]) -> Any:
    """What redis-py answers. A cancellation that comes meanwhile is raised: while it connects, redis-py swallows it."""
    task = asyncio.current_task()
    assert task is not None
    cancellations = task.cancelling()
    try:
        return await reading
    finally:
        if task.cancelling() > cancellations:
            raise asyncio.CancelledError


async def open_connection(url: str) -> Any:
    """A connection of redis-py, ready for commands; replies are text.

    Raises:
        CONNECTION_LOST: nobody answers there.
    """
    options: Any = parse_url(clean_url(url))
    kind: Any = options.pop("connection_class", Connection)
    options.setdefault("socket_timeout", REPLY_TIMEOUT_S)
    connection = kind(**options, decode_responses=True, socket_connect_timeout=5)
    try:
        await cancellable(connection.connect())
    except BaseException:  # a server that dies during the handshake, or a caller that is cancelled
        await connection.disconnect(nowait=True)
        raise
    return connection


class RedisConnection:
    """Sends commands over one connection of the event loop it was made on.

    Args:
        patience_s: how long commands wait for a server that is away before they fail; for one that was never there
            not longer than 3 s.
    """

    def __init__(self, url: str, *, patience_s: float = 60.0) -> None:
        self.url, self._patience_s = clean_url(url), patience_s
        self._pending: list[Pending] = []
        self._task: asyncio.Task[None] | None = None
        self._connection: Any = None
        self.connected = 0  # how often; a store that restarted is a new connection

    def ask(self, *command: Any) -> "asyncio.Future[Any]":
        """The reply to come; an error reply is raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        patience_s = self._patience_s if self.connected else min(FIRST_CONNECT_S, self._patience_s)
        self._pending.append((pack_command(command), future, time.monotonic() + patience_s))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._work())
        return future

    async def close(self) -> None:
        """Let go of the connection; pending commands fail."""
        await cancel_and_wait(self._task)
        _fail(self._pending, JournalError(f"the connection to {self.place} was closed before it answered"))
        self._pending = []
        await self._drop()

    @property
    def place(self) -> str:
        """The URL for people: without its password."""
        return re.sub(r"://[^/@]*@", "://", self.url)

    async def _work(self) -> None:
        wait_s = RECONNECT_S
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await self._connect()
                unwritten = await self._exchange(batch)
                if not unwritten:
                    wait_s = RECONNECT_S
                    continue
                self._pending = unwritten + self._pending
                await asyncio.sleep(wait_s)
                wait_s = min(MAX_RECONNECT_S, wait_s * 2)
            except CONNECTION_LOST as e:
                await self._drop()
                now = time.monotonic()
                away = ServiceDown(
                    f"no journal server responds at {self.place} ({e})", hint="start it, or configure another"
                )
                _fail([unsent for unsent in batch if unsent[2] <= now or isinstance(e, AuthenticationError)], away)
                self._pending = [unsent for unsent in batch if not unsent[1].done()] + self._pending
                await asyncio.sleep(wait_s)
                wait_s = min(MAX_RECONNECT_S, wait_s * 2)
            except asyncio.CancelledError:
                self._pending = [unsent for unsent in batch if not unsent[1].done()] + self._pending
                raise
            except Exception as e:  # whatever it is, nobody may wait forever for a reply that will not come
                await self._drop()
                _fail(batch, explain_error(e))

    async def _connect(self) -> None:
        if self._connection is None:
            self._connection = await open_connection(self.url)
            self.connected += 1

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _exchange(self, batch: list[Pending]) -> list[Pending]:
        """Send all, read all; a reply is given to its asker at once, so that a later loss repeats only the rest.

        Returns:
            What the server does not write for now, because its disk is full: a finished LLM call is worth waiting for room.
        """
        connection, unwritten = self._connection, []
        await connection.send_packed_command(b"".join([command for command, _, _ in batch]))
        for pending in batch:
            _, future, until = pending
            try:
                reply = await connection.read_response()
            except BusyLoadingError:
                raise
            except ResponseError as e:
                reply = e
            if future.done():
                continue  # its asker has gone
            if isinstance(reply, Exception) and str(reply).startswith("MISCONF") and time.monotonic() < until:
                unwritten.append(pending)
            elif isinstance(reply, Exception):
                future.set_exception(explain_error(reply))
            else:
                future.set_result(reply)
        return unwritten


def _fail(batch: list[Pending], error: Exception) -> None:
    for _, future, _ in batch:
        if not future.done():
            future.set_exception(error)


def explain_error(error: Exception) -> Exception:
    """A server's error, with what to do about it."""
    text = str(error)
    if isinstance(error, NoScriptError):
        return error
    if text.startswith("OOM") or "maxmemory" in text:
        return JournalError(
            f"the journal's server is out of memory ({text})", hint="give it more, or let runs go with retain_days"
        )
    if "#!lua" in text or "near '#'" in text:
        return JournalError(
            f"the journal's server is too old for its scripts ({text})", hint="it takes Redis 7 or any Valkey"
        )
    if text.startswith("MISCONF") or isinstance(error, ReadOnlyError):
        return JournalError(
            f"the journal's server does not write ({text})", hint="look at its disk, and at whether it is a replica"
        )
    return JournalError(f"the journal's server refused a command ({text})", hint="agentmesh doctor looks for the cause")
