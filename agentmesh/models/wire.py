"""Prompts and answers as the OpenAI chat API writes them; pure translation.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from agentmesh.message import Message, ToolCall, ToolSpec, Usage
from agentmesh.ports import Answer, Prompt
from agentmesh.schema import dumps


@lru_cache(maxsize=8192)
def message_text(message: Message) -> str:
    """A message as JSON text; cached, since a conversation is sent whole at every turn."""
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
    function = {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}
    return {"type": "function", "function": function}


def body(prompt: Prompt, *, stream: bool) -> bytes:
    """The request's body."""
    rest: dict[str, Any] = {"model": prompt.model, **prompt.options}
    if prompt.tools:
        rest["tools"] = [tool_json(t) for t in prompt.tools]
    if prompt.output is not None:
        schema = {"name": "answer", "schema": dict(prompt.output), "strict": True}
        rest["response_format"] = {"type": "json_schema", "json_schema": schema}
    if stream:
        rest |= {"stream": True, "stream_options": {"include_usage": True}}
    messages = ",".join([message_text(m) for m in prompt.messages])
    return f'{{"messages":[{messages}],{dumps(rest)[1:]}'.encode()


def usage_of(data: Mapping[str, Any] | None) -> Usage:
    """What the server counted; zeros where it did not."""
    if not data:
        return Usage()
    cached = (data.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(data.get("prompt_tokens") or 0, data.get("completion_tokens") or 0, cached)


def answer_of(data: Mapping[str, Any]) -> Answer:
    """An answer that came whole.

    Raises:
        KeyError, IndexError, TypeError: it is not an answer.
    """
    choice = data["choices"][0]
    said = choice["message"]
    calls = tuple(
        ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in said.get("tool_calls") or ()
    )
    message = Message("assistant", said.get("content") or "", calls)
    return Answer(message, usage_of(data.get("usage")), _finish(choice.get("finish_reason")))


def _finish(reason: str | None) -> Any:
    return reason if reason in ("stop", "length", "tool_calls") else "stop"


class Assembly:
    """An answer put together from a stream's pieces."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, list[str]] = {}  # index -> id, name, arguments
        self._usage: Mapping[str, Any] | None = None
        self.finish: str | None = None

    def add(self, data: Mapping[str, Any]) -> str:
        """Take a piece; answers its text."""
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
        text: str = delta.get("content") or ""
        self._text.append(text)
        return text

    def answer(self) -> Answer:
        """The whole of it."""
        calls = tuple(ToolCall(*self._calls[i]) for i in sorted(self._calls))
        return Answer(Message("assistant", "".join(self._text), calls), usage_of(self._usage), _finish(self.finish))
