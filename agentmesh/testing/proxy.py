"""A TCP proxy in a thread of this process: latency, resets, silence, half-open links, a cut after the k-th Redis command.

    with Proxy(valkey.url) as proxy:
        Mesh(crew, broker=proxy.url)
        proxy.reset()

It knows nothing of agentmesh, only bytes and where a Redis command ends.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from agentmesh.testing.loopback import LoopbackServer

PIECE_BYTES = 65536
CLOSE_S = 1.0  # how long a server may take to close a link that was cut after its command
PORTS = {"amqp": 5672, "amqps": 5671}
T = TypeVar("T")


class Commands:
    """Finds where commands end in a Redis client's bytes, however they are cut into pieces.

    >>> Commands().ends(b"*1\\r\\n$4\\r\\nPING\\r\\n*2\\r\\n$3\\r\\nGET")
    [14]
    """

    def __init__(self) -> None:
        self._line, self._skip, self._left = b"", 0, 0

    def ends(self, data: bytes) -> list[int]:
        """The offset behind each command that ends in this piece."""
        offsets, at = [], 0
        while at < len(data):
            if self._skip:
                took = min(self._skip, len(data) - at)
                self._skip -= took
                at += took
                if not self._skip:
                    self._left -= 1
                    if not self._left:
                        offsets.append(at)
                continue
            end = data.find(b"\n", at) + 1
            if not end:
                self._line += data[at:]
                break
            line, self._line, at = self._line + data[at:end], b"", end
            if line[:1] == b"*":
                self._left = int(line[1:])
            elif line[:1] == b"$":
                self._skip = int(line[1:]) + 2
            else:
                offsets.append(at)  # an inline command
        return offsets


class _Link:
    """One client's connection, and the one to the server made for it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.client, self.server = client, server
        self.commands = Commands()
        self.half_open = False
        self.server_ended = asyncio.Event()

    def reset(self) -> None:
        for writer in (self.client, self.server):
            _reset(writer)


class Proxy(LoopbackServer):
    """Stands between clients and one server; every method may be called from any thread.

    Args:
        target: the server's URL: `redis://…`, `unix://…`, `redis+socket://…`, `amqp://…`; no TLS.
        latency_s: added to each piece in either direction, in seconds.

    Attributes:
        url: the target's URL through the proxy, on loopback.
        commands: how many Redis commands passed.
        links: how many connections were made.
    """

    def __init__(self, target: str, *, latency_s: float = 0.0) -> None:
        super().__init__("chaos-proxy")
        self._target, self.latency_s = urlsplit(target), latency_s
        self.url = ""
        self.commands = self.links = 0
        self._open: set[_Link] = set()
        self._refusing = False
        self._passing = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._cut_at, self._lose = 0, "reply"
        self._then: Callable[[], None] = lambda: None

    # ---- faults --------------------------------------------------------------------------------
    def reset(self) -> int:
        """End every link with a TCP reset; how many there were. New ones pass."""
        return self._do(self._reset())

    def half_open(self) -> int:
        """Close every link on the server's side alone: what clients send is dropped. New links pass; how many there were."""
        return self._do(self._half_open())

    def silence(self, *ways: Literal["up", "down"]) -> None:
        """Hold back everything to the server (`up`), to the clients (`down`), or in both directions, until `heal`."""
        self._do(self._set_passing(set(ways or ("up", "down")), False))

    def refuse(self) -> None:
        """Reset every link, and every new one at once, until `heal`."""
        self._refusing = True
        self.reset()

    def heal(self) -> None:
        """End silence, refusal and a pending cut; half-open links stay as they are."""
        self._refusing, self._cut_at = False, 0
        self._do(self._set_passing({"up", "down"}, True))

    def cut_after(
        self, k: int, *, lose: Literal["reply", "command"] = "reply", then: Callable[[], None] | None = None
    ) -> None:
        """Refuse everything from the k-th Redis command on, counted from now over all links.

        Args:
            k: at least 1.
            lose: `reply`: the server has executed the command and its reply is lost; `command`: it never arrived.
            then: called at the cut, on the proxy's thread.
        """
        self._lose, self._then = lose, then or (lambda: None)
        self.commands = 0
        self._cut_at = k

    # ---- parts ---------------------------------------------------------------------------------
    def _do(self, coro: Coroutine[Any, Any, T]) -> T:
        if not self._thread.is_alive():
            coro.close()
            raise RuntimeError("the proxy is not running: use it in a `with`")
        return asyncio.run_coroutine_threadsafe(coro, self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = self._through(server.sockets[0].getsockname()[1])
        for passing in self._passing.values():
            passing.set()
        return server

    def _close_links(self) -> None:
        for link in list(self._open):
            link.reset()

    def _through(self, port: int) -> str:
        t = self._target
        if t.scheme in ("unix", "redis+socket"):
            options = parse_qs(t.query)
            return f"redis://127.0.0.1:{port}/{(options.get('db') or options.get('virtual_host') or ['0'])[0]}"
        who, at, _ = t.netloc.rpartition("@")
        return t._replace(netloc=f"{who}{at}127.0.0.1:{port}").geturl()

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        t = self._target
        if t.scheme in ("unix", "redis+socket"):
            return await asyncio.open_unix_connection(unquote(t.path))
        return await asyncio.open_connection(t.hostname, t.port or PORTS.get(t.scheme, 6379))

    async def _serve(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            if self._refusing:
                raise ConnectionError
            from_server, server = await self._dial()
        except OSError:
            _reset(client)
            return
        self.links += 1
        link = _Link(client, server)
        self._open.add(link)
        pumps = [
            asyncio.ensure_future(self._pump_up(link, from_client)),
            asyncio.ensure_future(self._pump_down(link, from_server)),
        ]
        try:
            with suppress(asyncio.CancelledError):  # the proxy ends, which asyncio's streams would report as a failure
                await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._open.discard(link)
            link.reset()

    async def _pump_up(self, link: _Link, from_client: asyncio.StreamReader) -> None:
        redis = not self._target.scheme.startswith("amqp")
        while data := await from_client.read(PIECE_BYTES):
            if link.half_open:
                continue
            ends = link.commands.ends(data) if redis else []
            before, self.commands = self.commands, self.commands + len(ends)
            if self._cut_at and before < self._cut_at <= self.commands:
                whole = self._cut_at - before - (self._lose == "command")
                await self._cut(link, data[: ends[whole - 1]] if whole else b"")
                return
            await self._delay("up")
            if not link.half_open:
                link.server.write(data)
                await link.server.drain()
        if not link.half_open:
            link.server.close()
        raise ConnectionError("the client has gone")

    async def _pump_down(self, link: _Link, from_server: asyncio.StreamReader) -> None:
        try:
            while data := await from_server.read(PIECE_BYTES):
                await self._delay("down")
                if not link.half_open and not self._refusing:
                    link.client.write(data)
                    await link.client.drain()
        except OSError:
            pass
        link.server_ended.set()
        if not link.half_open and not self._refusing:
            raise ConnectionError("the server has gone")

    async def _delay(self, way: str) -> None:
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        await self._passing[way].wait()

    async def _cut(self, link: _Link, last: bytes) -> None:
        self._refusing, self._cut_at = True, 0
        if last:
            link.server.write(last)
            link.server.write_eof()  # the server executes what it has read, then sees the end and closes
            with suppress(TimeoutError):
                await asyncio.wait_for(link.server_ended.wait(), CLOSE_S)
        self._then()
        await self._reset()

    async def _reset(self) -> int:
        links = list(self._open)
        for link in links:
            link.reset()
        return len(links)

    async def _half_open(self) -> int:
        links = [link for link in self._open if not link.half_open]
        for link in links:
            link.half_open = True
            _reset(link.server)
        return len(links)

    async def _set_passing(self, ways: set[Any], on: bool) -> None:
        for way in ways:
            passing = self._passing[way]
            passing.set() if on else passing.clear()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset instead of an orderly end."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
