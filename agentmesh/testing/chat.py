"""What an OpenAI-compatible server writes: completions, the chunks of a stream, errors; pure translation.

Source: https://platform.openai.com/docs/api-reference/chat
"""

import json
from collections.abc import Iterable
from typing import Any

from agentmesh.models.scripted import Reply, says, uses


def error_text(message: str) -> str:
    """The body of a refusal."""
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


def loop(body: dict[str, Any], rounds: int) -> Reply:
    """Call the first tool until it has answered `rounds` times, then say so."""
    done = sum(m["role"] == "tool" for m in body["messages"])
    if body.get("tools") and done < rounds:
        function = body["tools"][0]["function"]
        wanted = function["parameters"].get("properties", {})
        return uses(function["name"], **{name: _example(schema) for name, schema in wanted.items()})
    return says("done")


def _example(schema: dict[str, Any]) -> Any:
    return {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}.get(schema.get("type", ""), "x")


def _usage(body: dict[str, Any], reply: Reply) -> dict[str, int]:
    asked = sum(len(str(m.get("content") or "")) for m in body["messages"]) // 4 + 1
    said = len(reply.text) // 4 + 1
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-fake", "object": kind, "created": 0, "model": body.get("model", "fake")}


def _call(body: dict[str, Any], i: int, name: str, arguments: str) -> dict[str, Any]:
    """A tool call; its id is met once in a conversation."""
    call_id = f"call_{len(body['messages'])}_{i}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def whole(body: dict[str, Any], reply: Reply) -> dict[str, Any]:
    """A chat completion."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None}
    if reply.calls:
        message["tool_calls"] = [_call(body, i, *call) for i, call in enumerate(reply.calls)]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if reply.calls else "stop"}
    return {**_head(body, "chat.completion"), "choices": [choice], "usage": _usage(body, reply)}


def pieces(body: dict[str, Any], reply: Reply) -> Iterable[str]:
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
