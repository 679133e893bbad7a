"""Tool calls as text, in the format most open models were taught: `<tool_call>{...}</tool_call>`. Pure translation.

Source: https://github.com/NousResearch/Hermes-Function-Calling
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from agentmesh.message import Message, ToolCall, ToolSpec
from agentmesh.ports import Prompt
from agentmesh.schema import dumps

CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)", re.DOTALL)
TOOLS_TEXT = (
    "You may call these tools:\n{tools}\n"
    'To call one, answer with <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call> and nothing else.'
)
OUTPUT_TEXT = "Answer with JSON alone that meets this JSON Schema:\n{schema}"

Turn = dict[str, Any]


def conversation(prompt: Prompt, *, template: str) -> tuple[list[Turn], list[Turn] | None]:
    """Messages and tools for a chat template: tools by themselves where it writes them in this format, else as text."""
    native = bool(prompt.tools) and "tools" in template and "<tool_call>" in template
    messages = [_native(m) if native else _plain(m) for m in prompt.messages]
    told = []
    if prompt.tools and not native:
        told.append(TOOLS_TEXT.format(tools="\n".join(dumps(_function(t)) for t in prompt.tools)))
    if prompt.output is not None:
        told.append(OUTPUT_TEXT.format(schema=dumps(dict(prompt.output))))
    if told:
        if messages and messages[0]["role"] == "system":
            told.insert(0, messages.pop(0)["content"])
        messages.insert(0, {"role": "system", "content": "\n\n".join(told)})
    return messages, [{"type": "function", "function": _function(t)} for t in prompt.tools] if native else None


def calls_of(text: str, tools: Sequence[ToolSpec], *, turn: int) -> tuple[str, tuple[ToolCall, ...]]:
    """The text without its tool calls, and these; one that is no JSON stays text.

    Args:
        turn: makes the calls' ids unlike those of other turns.
    """
    if not tools:
        return text, ()
    calls: list[ToolCall] = []
    for found in CALL.findall(text):
        try:
            asked = json.loads(found)
            name, arguments = str(asked["name"]), asked.get("arguments", {})
        except (ValueError, KeyError):
            continue
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(ToolCall(f"call_{turn}_{len(calls)}", name, written))
    return (CALL.sub("", text).strip() if calls else text), tuple(calls)


def _function(spec: ToolSpec) -> Turn:
    return {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}


def _plain(message: Message) -> Turn:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
    calls = [f'<tool_call>{{"name": "{c.name}", "arguments": {c.arguments}}}</tool_call>' for c in message.tool_calls]
    return {"role": message.role, "content": "\n".join([message.text, *calls] if message.text else calls)}


def _native(message: Message) -> Turn:
    if message.role == "tool":
        return {"role": "tool", "content": message.text}
    turn: Turn = {"role": message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": _arguments(c.arguments)}}
            for c in message.tool_calls
        ]
    return turn


def _arguments(text: str) -> Any:
    """Templates write arguments as JSON again, so they want them read; what the model miswrote stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
