"""One pipelined connection: commands of one turn of the event loop are sent together, and again when a connection is lost.

Every command must be repeatable: one whose reply was lost is sent again.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Coroutine
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
REPLY_TIMEOUT_S = 5.0  # a connection without an answer for so long counts as lost; less than a lease lasts
Pending = tuple[
    bytes, asyncio.Future[Any], float
]  # the packed command, its reply, the monotonic time until which to try


def clean_url(url: str) -> str:
    """The URL as redis-py reads it: kombu's `redis+socket` and `virtual_host` are translated."""
    url = url.replace("valkey://", "redis://", 1).replace("valkeys://", "rediss://", 1)
    return url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")


_RUNNING: set["asyncio.Task[None]"] = set()


def start_task(work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """A task that lives until it ends. asyncio refers to a task weakly: with its owner it would be collected half-way."""
    task = asyncio.get_running_loop().create_task(work)
    _RUNNING.add(task)
    task.add_done_callback(_RUNNING.discard)
    return task


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
        CONNECTION_LOST: the server does not respond.
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
        patience_s: how long commands wait for an unreachable server before they fail; at most FIRST_CONNECT_S for one
            that has not been reached yet.

    Attributes:
        connected: how often a connection was made; a server that restarted is a new one.
    """

    def __init__(self, url: str, *, patience_s: float = 60.0) -> None:
        self.url, self._patience_s = clean_url(url), patience_s
        self._pending: list[Pending] = []
        self._task: asyncio.Task[None] | None = None
        self._connection: Any = None
        self.connected = 0

    def ask(self, *command: Any) -> "asyncio.Future[Any]":
        """The command's reply, as a future.

        Raises (the future):
            JournalError: the server answered with an error. NoScriptError is raised as it is.
            ServiceDown: the server has been unreachable for too long.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        patience_s = self._patience_s if self.connected else min(FIRST_CONNECT_S, self._patience_s)
        self._pending.append((pack_command(command), future, time.monotonic() + patience_s))
        if self._task is None or self._task.done():
            self._task = start_task(self._work())
        return future

    async def close(self) -> None:
        """Close the connection; pending commands fail."""
        await cancel_and_wait(self._task)
        _fail(self._pending, JournalError(f"the connection to {self.place} was closed before it answered"))
        self._pending = []
        await self._drop()

    @property
    def place(self) -> str:
        """The URL without its password, for messages."""
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
                unreachable = ServiceDown(
                    f"no journal server responds at {self.place} ({e})", hint="start it, or configure another"
                )
                late = [unsent for unsent in batch if unsent[2] <= now or isinstance(e, AuthenticationError)]
                _fail(late, unreachable)
                self._pending = [unsent for unsent in batch if not unsent[1].done()] + self._pending
                await asyncio.sleep(wait_s)
                wait_s = min(MAX_RECONNECT_S, wait_s * 2)
            except asyncio.CancelledError:
                self._pending = [unsent for unsent in batch if not unsent[1].done()] + self._pending
                raise
            except Exception as e:  # whatever it is, no command may wait for ever
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
        """Send all, read all. Each reply resolves its future at once, so that after a loss only the rest is repeated.

        Returns:
            The commands that the server refused because its disk is full: a finished model call is worth a wait.
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
                continue  # its caller was cancelled
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
    """An error of the server as a JournalError with a hint; NoScriptError as it is."""
    text = str(error)
    if isinstance(error, NoScriptError):
        return error
    if text.startswith("OOM") or "maxmemory" in text:
        return JournalError(
            f"the journal's server is out of memory ({text})", hint="raise its maxmemory, or lower retain_days"
        )
    if "#!lua" in text or "near '#'" in text:
        return JournalError(
            f"the journal's server is too old for the journal's scripts ({text})", hint="use Redis 7 or any Valkey"
        )
    if text.startswith("MISCONF") or isinstance(error, ReadOnlyError):
        return JournalError(
            f"the journal's server does not write ({text})", hint="free its disk, or use the primary if it is a replica"
        )
    return JournalError(
        f"the journal's server refused a command ({text})", hint="find the cause with: agentmesh doctor"
    )
