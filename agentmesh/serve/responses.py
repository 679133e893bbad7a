"""What a client gets: completions, stream chunks, errors, and the ASGI response that carries them."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.errors import (
    ConfigError,
    DefinitionError,
    LimitReached,
    MeshError,
    RunCancelledError,
    RunFailedError,
    ServiceDown,
)
from agentmesh.message import ToolCall, Usage
from agentmesh.schema import dumps

# What a run failed with -> HTTP status and OpenAI's code for it. The same request would cost the same and fail the same.
ERROR_CODES = {
    "ContextTooLong": (400, "context_length_exceeded"),
    "GpuOutOfMemory": (400, "context_length_exceeded"),
    "ModelRefused": (502, "model_refused"),
    "ModelError": (502, "model_error"),
    "OutputInvalid": (502, "output_invalid"),
    "StepTimeout": (504, "step_timeout"),
    "LimitReached": (429, "limit_reached"),
}


class ApiError(Exception):
    """An error as a client gets it.

    Args:
        status: the HTTP status.
        code: for programs; the message is for people.
        param: the part of the request that is wrong.
        retryable: whether the same request may succeed later; None leaves that to the status.
    """

    def __init__(
        self, status: int, message: str, code: str = "", *, param: str = "", retryable: bool | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retryable = status, message, code, param, retryable

    def to_json(self) -> dict[str, Any]:
        """The body.

        Source: https://platform.openai.com/docs/guides/error-codes
        """
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param or None, "code": self.code or None}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Tells the official client whether to retry."""
        return {} if self.retryable is None else {"x-should-retry": "true" if self.retryable else "false"}


def api_error_of(error: MeshError) -> ApiError:
    """One of our errors as a client gets it."""
    if isinstance(error, RunCancelledError):
        return ApiError(409, str(error), "run_cancelled", retryable=False)
    if isinstance(error, RunFailedError | LimitReached):
        cause = error.cause or "" if isinstance(error, RunFailedError) else "LimitReached"
        status, code = ERROR_CODES.get(cause, (500, "run_failed"))
        return ApiError(status, str(error), code, retryable=False)
    if isinstance(error, ServiceDown):
        return ApiError(503, str(error), "service_down", retryable=True)
    if isinstance(error, DefinitionError):
        return ApiError(400, str(error), "invalid_value")
    if isinstance(error, ConfigError):
        return ApiError(500, str(error), "config", retryable=False)
    return ApiError(500, str(error), retryable=False)


# ---- Answers as OpenAI's API writes them --------------------------------------------------------

SSE_DONE = b"data: [DONE]\n\n"
SSE_PING = b": still running\n\n"


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What a run came to, as a client sees it."""

    text: str
    calls: Sequence[ToolCall]
    usage: Usage
    cut: bool = False

    @property
    def finish(self) -> str:
        """OpenAI's word for why it ended."""
        return "length" if self.cut else "tool_calls" if self.calls else "stop"


@dataclass(frozen=True, slots=True)
class ChatResponse:
    """One answer in OpenAI's form, whole or in chunks.

    Args:
        run_id: of the run.
        model: as the request named it.
        created_s: seconds since the epoch.
    """

    run_id: str
    model: str
    created_s: int

    def whole(self, outcome: RunOutcome) -> dict[str, Any]:
        """A chat completion."""
        message: dict[str, Any] = {"role": "assistant", "content": outcome.text or None, "refusal": None}
        if outcome.calls:
            message["tool_calls"] = [_tool_call_json(c) for c in outcome.calls]
        else:
            message["content"] = outcome.text
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": outcome.finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage_json(outcome.usage)}

    def begins(self) -> bytes:
        """A stream's first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, kind: str, text: str) -> bytes:
        """A piece of text, or of reasoning under the name that vLLM, SGLang and llama-server use."""
        return self._chunk({"reasoning_content" if kind == "thought" else "content": text})

    def ends(self, outcome: RunOutcome, *, with_usage: bool) -> Iterable[bytes]:
        """The tool calls, the finish reason, and the usage where the request wants it."""
        if outcome.calls:
            yield self._chunk({"tool_calls": [{"index": i, **_tool_call_json(c)} for i, c in enumerate(outcome.calls)]})
        yield self._chunk({}, outcome.finish)
        if with_usage:
            rest = {"choices": [], "usage": usage_json(outcome.usage)}
            yield sse_event({**self._head("chat.completion.chunk"), **rest})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.run_id}", "object": kind, "created": self.created_s, "model": self.model}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse_event({**self._head("chat.completion.chunk"), "choices": [choice]})


def sse_event(value: Any) -> bytes:
    """A server-sent event."""
    return f"data: {dumps(value)}\n\n".encode()


def usage_json(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's form."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def models_json(names: Iterable[str], created_s: int) -> dict[str, Any]:
    """The list of models."""
    return {"object": "list", "data": [model_json(name, created_s) for name in names]}


def model_json(name: str, created_s: int) -> dict[str, Any]:
    """One model."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "agentmesh"}


def _tool_call_json(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


# ---- One HTTP answer over ASGI ------------------------------------------------------------------

MAX_BODY_BYTES = 32 << 20
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class HttpResponse:
    """The response to one client.

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
        await self._send({"type": "http.response.body", "body": SSE_DONE})

    async def refuse(self, refusal: ApiError) -> None:
        """Send an error, with its status where no byte was sent yet; nothing after the end."""
        if self._over:
            return
        if self._streams:
            await self.event(sse_event(refusal.to_json()))
            await self.end()
        else:
            self.headers |= refusal.headers
            await self.whole(refusal.status, refusal.to_json())

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        pairs = [(k.encode(), v.encode()) for k, v in {**headers, **self.headers}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


def headers_of(scope: Scope) -> dict[str, str]:
    """A request's headers, by their lower-case names."""
    return {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}


async def body_of(headers: Mapping[str, str], receive: Receive) -> bytes:
    """The request's body, if its type is JSON: a web page cannot send that to another origin without a preflight.

    Raises:
        ApiError: its type is another, or it is too large.
        ConnectionError: the client left before its end.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send the request as `Content-Type: application/json`", "not_json")
    read = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        read += message.get("body", b"")
        if len(read) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES >> 20} MiB; send less", "too_large")
        if not message.get("more_body"):
            return bytes(read)


async def client_gone(receive: Receive) -> None:
    """Come back when the client has disconnected; for after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)
