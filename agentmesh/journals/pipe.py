"""One pipelined connection: what is asked for in one turn of the event loop is sent together, and survives a lost server.

Every command given here must be repeatable: one whose reply was lost is sent again.
"""

import asyncio
import time
from typing import Any

from hiredis import pack_command
from redis.asyncio.connection import Connection, parse_url
from redis.exceptions import BusyLoadingError, ConnectionError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from agentmesh.errors import JournalError, ServiceDown

LOST = (ConnectionError, RedisTimeout, BusyLoadingError, OSError, EOFError)
Command = tuple[Any, ...]


def clean_url(url: str) -> str:
    """A URL as redis-py reads it: kombu's `redis+socket` and `virtual_host` are translated."""
    url = url.replace("valkey://", "redis://", 1).replace("valkeys://", "rediss://", 1)
    return url.replace("redis+socket://", "unix://", 1).replace("virtual_host=", "db=")


class Pipe:
    """Sends commands over one connection of the event loop it was made on.

    Args:
        patience_s: how long commands wait for a server that is away before they fail.
    """

    def __init__(self, url: str, *, patience_s: float = 60.0) -> None:
        self.url, self._patience_s = clean_url(url), patience_s
        self._pending: list[tuple[Command, asyncio.Future[Any], float]] = []
        self._task: asyncio.Task[None] | None = None
        self._connection: Any = None
        self.connected = 0  # how often; a store that restarted is a new connection

    def ask(self, *command: Any) -> "asyncio.Future[Any]":
        """The reply to come; an error reply is raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._pending.append((command, future, time.monotonic() + self._patience_s))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._work())
        return future

    async def close(self) -> None:
        """Let go of the connection; pending commands fail."""
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            await self._connection.disconnect()
            self._connection = None

    async def _work(self) -> None:
        wait_s = 0.01
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await self._connect()
                await self._exchange(batch)
                wait_s = 0.01
            except LOST as e:
                await self._drop()
                now = time.monotonic()
                for _, future, deadline in batch:
                    if not future.done() and deadline <= now:
                        future.set_exception(ServiceDown(f"no journal answers at {self.url} ({e}); start it, or name another"))
                self._pending = [b for b in batch if not b[1].done()] + self._pending
                await asyncio.sleep(wait_s)
                wait_s = min(0.5, wait_s * 2)

    async def _connect(self) -> None:
        if self._connection is None:
            options: Any = parse_url(self.url)
            kind: Any = options.pop("connection_class", Connection)
            connection = kind(**options, decode_responses=True, socket_connect_timeout=5)
            await connection.connect()
            self._connection = connection
            self.connected += 1

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def _exchange(self, batch: list[tuple[Command, "asyncio.Future[Any]", float]]) -> None:
        """Send all, read all; a reply is given to its asker at once, so that a later loss repeats only the rest."""
        connection = self._connection
        await connection.send_packed_command(b"".join([pack_command(command) for command, _, _ in batch]))
        for _, future, _ in batch:
            try:
                reply = await connection.read_response()
            except BusyLoadingError:
                raise
            except ResponseError as e:
                reply = e
            if future.done():
                continue  # its asker has gone
            if isinstance(reply, Exception):
                future.set_exception(_meaning(reply))
            else:
                future.set_result(reply)


def _meaning(error: Exception) -> Exception:
    """A server's error, with what to do about it."""
    text = str(error)
    if isinstance(error, NoScriptError):
        return error
    if text.startswith("OOM") or "maxmemory" in text:
        return JournalError(f"the journal's server is out of memory ({text}); give it more, or let runs go with retain_days")
    if text.startswith("MISCONF") or isinstance(error, ReadOnlyError):
        return JournalError(f"the journal's server does not write ({text}); look at its disk, and at whether it is a replica")
    return error if isinstance(error, RedisError) else JournalError(text)
