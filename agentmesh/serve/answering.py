"""One HTTP answer over ASGI: JSON as a whole, or server-sent events once the first one is there."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from agentmesh.schema import dumps
from agentmesh.serve.refusal import Refusal
from agentmesh.serve.reply import DONE, data

MOST_BYTES = 32 << 20
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Answering:
    """What one client is told.

    Attributes:
        headers: sent with the first byte.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._streams = self._over = False
        self.headers: dict[str, str] = {}

    async def whole(self, status: int, value: Any) -> None:
        """The answer as JSON."""
        self._over = True
        body = dumps(value).encode()
        await self._start(status, {"content-type": "application/json", "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def event(self, raw: bytes) -> None:
        """A piece of a stream."""
        if not self._streams:
            self._streams = True
            await self._start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        await self._send({"type": "http.response.body", "body": raw, "more_body": True})

    async def end(self) -> None:
        """The stream is complete."""
        self._over = True
        await self._send({"type": "http.response.body", "body": DONE})

    async def refuse(self, refusal: Refusal) -> None:
        """An error, with its status while that can still be said; nothing after the end."""
        if self._over:
            return
        if self._streams:
            await self.event(data(refusal.to_json()))
            await self.end()
        else:
            self.headers |= refusal.headers
            await self.whole(refusal.status, refusal.to_json())

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        pairs = [(k.encode(), v.encode()) for k, v in {**headers, **self.headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


def headers_of(scope: Scope) -> dict[str, str]:
    """A request's headers, by their names in small letters."""
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}


async def body_of(headers: Mapping[str, str], receive: Receive) -> bytes:
    """The request's body, which says that it is JSON: what no web page may send to another's server unasked.

    Raises:
        Refusal: it does not, or it is too large.
        ConnectionError: the client left in the middle of it.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "send the request as `Content-Type: application/json`", "not_json")
    read = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        read += message.get("body", b"")
        if len(read) > MOST_BYTES:
            raise Refusal(413, f"the body is larger than {MOST_BYTES >> 20} MiB; send less", "too_large")
        if not message.get("more_body"):
            return bytes(read)


async def left(receive: Receive) -> None:
    """Comes back when the client is gone; to be asked after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)
