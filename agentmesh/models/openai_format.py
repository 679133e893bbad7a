"""Prompts and answers as the OpenAI chat API writes them; pure translation.

Source: https://platform.openai.com/docs/api-reference/chat
"""

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from sys import getsizeof
from typing import Any

from agentmesh.message import Message, ToolCall, ToolSpec, Usage
from agentmesh.model import Answer, Prompt
from agentmesh.schema import dumps, loads
from agentmesh.sized_cache import MIB, SizedCache

# what `parse_answer` raises for JSON that is not an answer
MALFORMED_ANSWER = (ValueError, KeyError, IndexError, TypeError, AttributeError)
MAX_RETRY_AFTER_S = 86_400.0
API_KEY = re.compile(r"\bsk-[\w*.-]+")  # servers quote the key they refuse


def message_text(message: Message) -> str:
    """A message as JSON text; cached, since a conversation is sent whole at every turn."""
    text = _TEXTS.get(message)
    if text is None:
        text = _render_message(message)
        _TEXTS.put(message, text)
    return text


def _text_bytes(message: Message, text: str) -> int:
    return 512 + 2 * getsizeof(text)  # the text, and the message that it was made of


_TEXTS: SizedCache[Message, str] = SizedCache("message_texts", 16 * MIB, _text_bytes)


def _render_message(message: Message) -> str:
    if message.role == "tool":
        return dumps({"role": "tool", "tool_call_id": message.tool_call_id, "content": message.text})
    out: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        out["content"] = message.text or None
        out["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return dumps(out)


def tool_json(spec: ToolSpec) -> dict[str, Any]:
    """A tool as the API takes it."""
    function: dict[str, Any] = {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}
    if spec.strict is not None:
        function["strict"] = spec.strict
    return {"type": "function", "function": function}


def request_body(prompt: Prompt, *, stream: bool) -> bytes:
    """The request's body."""
    rest: dict[str, Any] = {"model": prompt.model, **prompt.options}
    if prompt.tools:
        rest["tools"] = [tool_json(t) for t in prompt.tools]
    if prompt.output is not None and not _has_schema(prompt.options.get("response_format")):
        schema = {"name": "answer", "schema": dict(prompt.output), "strict": True}
        rest["response_format"] = {"type": "json_schema", "json_schema": schema}
    if stream:
        rest |= {"stream": True, "stream_options": {"include_usage": True}}
    messages = ",".join([message_text(m) for m in prompt.messages])
    return f'{{"messages":[{messages}],{dumps(rest)[1:]}'.encode()


def _has_schema(response_format: Any) -> bool:
    """Whether the options bring a schema themselves, with a name and a strictness of its own."""
    return isinstance(response_format, Mapping) and response_format.get("type") == "json_schema"


def usage_of(data: Mapping[str, Any] | None) -> Usage:
    """What the server counted; zeros where it did not."""
    if not data:
        return Usage()
    cached = (data.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(data.get("prompt_tokens") or 0, data.get("completion_tokens") or 0, cached)


def parse_answer(data: Mapping[str, Any]) -> Answer:
    """The answer in a response that was not streamed.

    Raises:
        KeyError, IndexError, TypeError, AttributeError: it is not an answer.
    """
    choice = data["choices"][0]
    content = choice["message"]
    calls = tuple(
        _call(i, c.get("id"), c["function"]["name"], c["function"].get("arguments"))
        for i, c in enumerate(content.get("tool_calls") or ())
    )
    message = Message("assistant", content.get("content") or content.get("refusal") or "", calls)
    return Answer(message, usage_of(data.get("usage")), _finish(choice.get("finish_reason")))


def _call(i: int, call_id: str | None, name: str, arguments: Any) -> ToolCall:
    """A tool call; some servers leave out the id, or write arguments that are not text."""
    return ToolCall(call_id or f"call_{i}", name, arguments if isinstance(arguments, str) else dumps(arguments or {}))


def _finish(reason: str | None) -> Any:
    return reason if reason in ("stop", "length", "tool_calls") else "stop"


class StreamAssembler:
    """An answer put together from a stream's pieces.

    Attributes:
        finish: why the answer ended, None while it has not.
        has_text: whether any text came.
    """

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, list[str]] = {}  # index -> id, name, arguments
        self._usage: Mapping[str, Any] | None = None
        self.finish: str | None = None
        self.has_text = False

    def add(self, data: Mapping[str, Any]) -> str:
        """Add a piece of the stream; its text."""
        self._usage = data.get("usage") or self._usage
        if not data.get("choices"):
            return ""
        choice = data["choices"][0]
        self.finish = choice.get("finish_reason") or self.finish
        delta = choice.get("delta") or {}
        for piece in delta.get("tool_calls") or ():
            call = self._calls.setdefault(piece.get("index", 0), ["", "", ""])
            function = piece.get("function") or {}
            call[0] = piece.get("id") or call[0]
            call[1] += function.get("name") or ""
            call[2] += function.get("arguments") or ""
        text: str = delta.get("content") or delta.get("refusal") or ""
        if text:
            self._text.append(text)
            self.has_text = True
        return text

    def answer(self) -> Answer:
        """The whole answer."""
        calls = tuple(_call(i, *self._calls[i]) for i in sorted(self._calls))
        return Answer(Message("assistant", "".join(self._text), calls), usage_of(self._usage), _finish(self.finish))


class SseParser:
    """Splits a stream of server-sent events into their data; one event is one line, as every server writes it.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html

    Attributes:
        done: whether [DONE] has come.
    """

    def __init__(self) -> None:
        self._unfinished: list[bytes] = []  # pieces of a line that has not ended; a line may be megabytes
        self.done = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that this chunk completes."""
        if b"\n" not in chunk:
            self._unfinished.append(chunk)
            return []
        *lines, rest = b"".join([*self._unfinished, chunk]).split(b"\n")
        self._unfinished = [rest]
        events = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        if b"[DONE]" in events:
            self.done = True
            del events[events.index(b"[DONE]") :]
        return events


def retry_after_s(header: str | None) -> float | None:
    """Seconds to wait, from seconds or an HTTP date; None when it is neither.

    Source: RFC 9110, section 10.2.3
    """
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else None


def server_reason(text: str, key: str = "") -> str:
    """The reason in a server's refusal, never with the key in it."""
    try:
        data = loads(text)
        error = data.get("error", data)
        reason = str(error["message"] if isinstance(error, dict) else error)[:500]
    except MALFORMED_ANSWER:
        reason = text[:200].strip()
    reason = reason.replace(key, "…") if key else reason
    return API_KEY.sub("…", reason) or "no reason given"
