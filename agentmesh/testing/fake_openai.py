"""A fake OpenAI-compatible server: scripted completions, streams, errors and faults.

Source: https://platform.openai.com/docs/api-reference/chat
"""

import argparse
import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmesh.testing.loopback import LoopbackServer
from agentmesh.testing.scripted import Reply, says, uses


def error_body(message: str) -> str:
    """The body of an error."""
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": None}})


def scripted(lines: Iterable[str]) -> list[Reply]:
    """Replies from lines of JSON: `{"says": "text"}`, `{"uses": [["tool", {"argument": 1}]]}`, or both."""
    replies = []
    for line in filter(str.strip, lines):
        data = json.loads(line)
        reply = says(data.get("says", ""))
        for name, arguments in data.get("uses", ()):
            reply &= uses(name, **arguments)
        replies.append(reply)
    return replies


def tool_loop(body: dict[str, Any], rounds: int) -> Reply:
    """Call the first tool until it has answered `rounds` times, then answer "done"."""
    done = sum(m["role"] == "tool" for m in body["messages"])
    if body.get("tools") and done < rounds:
        function = body["tools"][0]["function"]
        properties = function["parameters"].get("properties", {})
        return uses(function["name"], **{name: _example(schema) for name, schema in properties.items()})
    return says("done")


def _example(schema: dict[str, Any]) -> Any:
    return {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}.get(schema.get("type", ""), "x")


def _usage(body: dict[str, Any], reply: Reply) -> dict[str, int]:
    prompt = sum(len(str(m.get("content") or "")) for m in body["messages"]) // 4 + 1
    answer = len(reply.text) // 4 + 1
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-fake", "object": kind, "created": 0, "model": body.get("model", "fake")}


def _call(body: dict[str, Any], i: int, name: str, arguments: str) -> dict[str, Any]:
    """A tool call; its id is unique in a conversation."""
    call_id = f"call_{len(body['messages'])}_{i}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def completion(body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    """A chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = [_call(body, i, *call) for i, call in enumerate(reply.calls)]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if reply.calls else "stop"}
    return {**_head(body, "chat.completion"), "choices": [choice], "usage": _usage(body, reply)}


def chunks(body: dict[str, Any], reply: Reply) -> Iterable[str]:
    """The same as a stream of chunks."""

    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return json.dumps({**head, "choices": [choice]})

    head = _head(body, "chat.completion.chunk")

    for i, word in enumerate(reply.text.split(" ") if reply.text else ()):
        yield chunk({"role": "assistant", "content": word if i == 0 else f" {word}"})
    for i, (name, arguments) in enumerate(reply.calls):
        half = len(arguments) // 2
        yield chunk({"tool_calls": [{"index": i, **_call(body, i, name, arguments[:half])}]})
        yield chunk({"tool_calls": [{"index": i, "function": {"arguments": arguments[half:]}}]})
    yield chunk({}, "tool_calls" if reply.calls else "stop")
    if (body.get("stream_options") or {}).get("include_usage"):
        yield json.dumps({**head, "choices": [], "usage": _usage(body, reply)})
    yield "[DONE]"


# ---- A fake OpenAI server on loopback -----------------------------------------------------------

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Answerer = Callable[[dict[str, Any]], Reply | str]


@dataclass(slots=True)
class Fault:
    """What the server does instead of answering, once.

    Args:
        status: answer with this HTTP status and `body`; 0 answers, but with one of the other faults.
        cut_after: bytes of the stream after which the connection is closed.
        drip_s: seconds between two pieces of a stream.
        hang: never answer.
        malformed: answer 200 with a body that is not JSON.
    """

    status: int = 0
    retry_after: str = ""
    body: str = ""
    content_type: str = "application/json"
    cut_after: int | None = None
    drip_s: float = 0.0
    hang: bool = False
    malformed: bool = False


@dataclass(slots=True)
class ReceivedRequest:
    """A request, and when it arrived."""

    body: dict[str, Any]
    at_s: float = field(default_factory=time.time)


class FakeOpenAI(LoopbackServer):
    """An OpenAI-compatible server in a thread of its own.

    Args:
        answer: replies in order, or a function of the request's body; default: `rounds` tool calls, then a text.
        latency_s: before each answer.

    Attributes:
        url: its base URL, with /v1.
        requests: every chat request.
    """

    def __init__(
        self, answer: Iterable[Reply | str] | Answerer | None = None, *, latency_s: float = 0.0, rounds: int = 1,
        keep: bool = True, port: int = 0,
    ) -> None:  # fmt: skip
        super().__init__("fake-openai")
        self._answer = _answerer(answer, rounds)
        self._latency_s, self._keep, self._port = latency_s, keep, port
        self.faults: deque[Fault] = deque()
        self.requests: list[ReceivedRequest] = []
        self.served = self.answered = 0
        self.url = ""
        self._open: set[_HttpConnection] = set()

    def fail_next(self, status: int, *, retry_after: float | str = "", times: int = 1, body: str = "") -> None:
        """Answer the next requests with this HTTP error."""
        self.faults.extend(Fault(status=status, retry_after=str(retry_after), body=body) for _ in range(times))

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet."""
        return self.served - self.answered

    async def _listen(self) -> asyncio.Server:
        server = await self._loop.create_server(lambda: _HttpConnection(self), "127.0.0.1", self._port)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        return server

    def _close_links(self) -> None:
        for connection in list(self._open):
            connection.drop()

    def reply(self, body: dict[str, Any]) -> Reply | Fault:
        """The answer to a request; one that the script does not have is a 400 that says so."""
        try:
            answer = self._answer(body)
        except StopIteration:
            last = str(body["messages"][-1].get("content"))[:200] if body.get("messages") else ""
            return _bad(f"request {self.served} is not in the script: {last!r}; add a reply for it")
        except Exception as e:
            return _bad(f"the answer to request {self.served} raised {type(e).__name__}: {e}")
        return says(answer) if isinstance(answer, str) else answer


class _HttpConnection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection, parsed by hand: a framework would cost more than what benchmarks measure."""

    def __init__(self, server: FakeOpenAI) -> None:
        self._server, self._data = server, b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server._open.discard(self)

    def drop(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._data) < end + 4 + length:
                return
            path, content = self._data[:end].split(b" ", 2)[1], self._data[end + 4 : end + 4 + length]
            self._data = self._data[end + 4 + length :]
            self._serve(path, content)

    def _serve(self, path: bytes, content: bytes) -> None:
        server = self._server
        if path.endswith(b"/models"):
            server.served += 1
            self._write(json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}).encode())
            return
        server.served += 1
        if not path.endswith(b"/chat/completions"):
            self._refuse(Fault(404, body=error_body(f"there is no {path.decode(errors='replace')} here")))
            return
        try:
            body = json.loads(content)
            body["messages"][0]["role"]
        except (ValueError, LookupError, TypeError):
            self._refuse(_bad("this is not a request for a chat completion"))
            return
        if server._keep:
            server.requests.append(ReceivedRequest(body))
        fault = server.faults.popleft() if server.faults else None
        if server._latency_s or (fault and (fault.hang or fault.drip_s)) or body.get("stream"):
            server._loop.create_task(self._later(body, fault))
        else:
            self._respond(body, fault)

    async def _later(self, body: dict[str, Any], fault: Fault | None) -> None:
        if fault and fault.hang:
            return
        if self._server._latency_s:
            await asyncio.sleep(self._server._latency_s)
        if body.get("stream") and not (fault and fault.status):
            await self._stream(body, fault or Fault())
        else:
            self._respond(body, fault)

    def _respond(self, body: dict[str, Any], fault: Fault | None) -> None:
        if fault and fault.status:
            self._refuse(fault)
        elif fault and fault.malformed:
            self._write(b"<html>not JSON</html>")
        elif isinstance(reply := self._server.reply(body), Fault):
            self._refuse(reply)
        else:
            self._write(json.dumps(completion(body, reply)).encode())

    def _refuse(self, fault: Fault) -> None:
        extra = f"Retry-After: {fault.retry_after}\r\n" if fault.retry_after else ""
        self._write(
            (fault.body or error_body(f"made to fail with {fault.status}")).encode(),
            fault.status,
            extra,
            fault.content_type,
        )

    def _write(
        self, content: bytes, status: int = 200, extra: str = "", content_type: str = "application/json"
    ) -> None:  # fmt: skip
        self._server.answered += 1
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\n{extra}\r\n"
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(head.encode() + content)

    async def _stream(self, body: dict[str, Any], fault: Fault) -> None:
        reply = self._server.reply(body)
        if isinstance(reply, Fault) or fault.malformed:
            self._respond(body, reply if isinstance(reply, Fault) else fault)
            return
        assert self._transport is not None
        self._transport.write(STREAM_HEAD)
        written = 0
        for piece in chunks(body, reply):
            data = f"data: {piece}\n\n".encode()
            written += len(data)
            if fault.cut_after is not None and written > fault.cut_after:
                self._server.answered += 1
                self._transport.close()
                return
            self._transport.write(b"%x\r\n%s\r\n" % (len(data), data))
            if fault.drip_s:
                await asyncio.sleep(fault.drip_s)
        self._server.answered += 1
        self._transport.write(b"0\r\n\r\n")


def _answerer(answer: Any, rounds: int) -> Answerer:
    if answer is None:
        return lambda body: tool_loop(body, rounds)
    if callable(answer):
        function: Answerer = answer
        return function
    replies = iter(list(answer))
    return lambda body: next(replies)


def _bad(message: str) -> Fault:
    return Fault(400, body=error_body(message))


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description="a fake OpenAI server for tests and benchmarks")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--script", type=Path, help="a file of replies, one a line")
    options = parser.parse_args()
    script = scripted(options.script.read_text().splitlines()) if options.script else None
    with FakeOpenAI(script, latency_s=options.latency, rounds=options.rounds, keep=False, port=options.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
