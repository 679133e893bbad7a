"""Answers as OpenAI's API writes them: a completion, the chunks of a stream, the list of models. Pure.

Source: https://platform.openai.com/docs/api-reference/chat/object
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.message import ToolCall, Usage
from agentmesh.schema import dumps

DONE = b"data: [DONE]\n\n"
PING = b": still at work\n\n"


@dataclass(frozen=True, slots=True)
class Outcome:
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
class Head:
    """What every part of one answer says.

    Args:
        run_id: of the run.
        model: as the request named it.
        created_s: seconds since the epoch.
    """

    run_id: str
    model: str
    created_s: int

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """A chat completion."""
        message: dict[str, Any] = {"role": "assistant", "content": outcome.text or None, "refusal": None}
        if outcome.calls:
            message["tool_calls"] = [_call(c) for c in outcome.calls]
        else:
            message["content"] = outcome.text
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": outcome.finish}
        return {**self._said("chat.completion"), "choices": [choice], "usage": usage_json(outcome.usage)}

    def begins(self) -> bytes:
        """A stream's first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, kind: str, text: str) -> bytes:
        """A piece of text, or of reasoning, which has the name that vLLM, SGLang and llama-server gave it."""
        return self._chunk({"reasoning_content" if kind == "thought" else "content": text})

    def ends(self, outcome: Outcome, *, with_usage: bool) -> Iterable[bytes]:
        """The tool calls, the reason why it ended, and what it cost where that was asked for."""
        if outcome.calls:
            yield self._chunk({"tool_calls": [{"index": i, **_call(c)} for i, c in enumerate(outcome.calls)]})
        yield self._chunk({}, outcome.finish)
        if with_usage:
            rest = {"choices": [], "usage": usage_json(outcome.usage)}
            yield data({**self._said("chat.completion.chunk"), **rest})

    def _said(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.run_id}", "object": kind, "created": self.created_s, "model": self.model}

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return data({**self._said("chat.completion.chunk"), "choices": [choice]})


def data(value: Any) -> bytes:
    """A server-sent event."""
    return f"data: {dumps(value)}\n\n".encode()


def usage_json(usage: Usage) -> dict[str, Any]:
    """What was counted."""
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


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
