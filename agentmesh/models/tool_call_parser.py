"""Tool calls as text: `<tool_call>{...}</tool_call>` as most open models were trained, JSON in a fence, or bare JSON; pure translation.

Source: https://github.com/NousResearch/Hermes-Function-Calling
"""

import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from agentmesh.message import Message, ToolCall, ToolSpec
from agentmesh.model import Prompt
from agentmesh.schema import dumps

DECODER = json.JSONDecoder()
OPEN, CLOSE = re.compile(r"<tool_call>\s*(?=\{)"), re.compile(r"\s*(?:</tool_call>|\Z)")
CUT_OFF_CALL = re.compile(
    r'<tool_call>\s*\{\s*"name":\s*"([^"]*)",\s*"(?:arguments|parameters)":\s*((?:(?!</tool_call>).)*)\Z', re.DOTALL
)
FENCED = re.compile(r"```(?:json|tool_call)?\s*\n(.*?)\n\s*```", re.DOTALL)
BARE = re.compile(r"\A\s*([\[{].*[\]}])\s*\Z", re.DOTALL)
TOOLS_TEXT = (
    "You may call these tools:\n{tools}\n"
    'To call one, answer with <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call> and nothing else.'
)
OUTPUT_TEXT = "Answer with JSON alone that meets this JSON Schema:\n{schema}"

Turn = dict[str, Any]


def chat_turns(prompt: Prompt, *, template: str, takes_system: bool = True) -> tuple[list[Turn], list[Turn] | None]:
    """Messages and tools for a chat template; tools are None where the template does not write them in this format.

    They are then part of the system turn's text, as the JSON Schema of the output is.

    Args:
        takes_system: whether the template has a system turn; else its text begins the first user's turn.
    """
    native = bool(prompt.tools) and "tools" in template and "<tool_call>" in template
    messages = [_native_turn(m) if native else _plain_turn(m) for m in prompt.messages]
    system_texts = []
    if prompt.tools and not native:
        system_texts.append(TOOLS_TEXT.format(tools="\n".join(dumps(_function(t)) for t in prompt.tools)))
    if prompt.output is not None:
        system_texts.append(OUTPUT_TEXT.format(schema=dumps(dict(prompt.output))))
    if messages and messages[0]["role"] == "system" and (system_texts or not takes_system):
        system_texts.insert(0, messages.pop(0)["content"])
    if system_texts and takes_system:
        messages.insert(0, {"role": "system", "content": "\n\n".join(system_texts)})
    elif system_texts and messages and messages[0]["role"] == "user":
        messages[0] = {"role": "user", "content": "\n\n".join([*system_texts, messages[0]["content"]])}
    elif system_texts:
        messages.insert(0, {"role": "user", "content": "\n\n".join(system_texts)})
    return messages, [{"type": "function", "function": _function(t)} for t in prompt.tools] if native else None


def parse_tool_calls(text: str, tools: Sequence[ToolSpec], *, turn: int) -> tuple[str, tuple[ToolCall, ...]]:
    """The text without its tool calls, and the calls; a call that is not JSON stays text.

    A call that was cut off in its arguments has those arguments, so that the model is told that they are invalid. Without
    tags, JSON in a fence or alone is a call if it names one of the tools.

    Args:
        turn: makes the calls' ids unlike those of other turns.
    """
    if not tools:
        return text, ()
    names = {t.name for t in tools}
    rest, calls = _parse_tagged(text, turn)
    if (cut := CUT_OFF_CALL.search(rest)) and cut[1] in names:
        calls, rest = [*calls, ToolCall(f"call_{turn}_", cut[1], cut[2].strip() or "{")], rest[: cut.start()]
    if calls:
        return rest.strip(), _numbered(calls)
    for pattern in (FENCED, BARE):
        calls = [call for matches in pattern.findall(text) for call in _parse_json(matches, turn) if call.name in names]
        if calls:
            return pattern.sub("", text).strip(), _numbered(calls)
    return text, ()


def _parse_tagged(text: str, turn: int) -> tuple[str, list[ToolCall]]:
    """The text without the calls in tags, and the calls. Their JSON says where it ends: a string may hold a closing tag."""
    calls: list[ToolCall] = []
    rest, after = "", 0
    for tag in OPEN.finditer(text):
        with contextlib.suppress(ValueError):
            value, end = DECODER.raw_decode(text, tag.end())
            closing = CLOSE.match(text, end)
            if tag.start() >= after and closing and (parsed := _calls_in(value, turn)):
                calls += parsed
                rest, after = rest + text[after : tag.start()], closing.end()
    return rest + text[after:], calls


def _parse_json(text: str, turn: int) -> list[ToolCall]:
    """The calls in a JSON text; none if it is something else."""
    try:
        return _calls_in(json.loads(text), turn)
    except ValueError:
        return []


def _calls_in(value: Any, turn: int) -> list[ToolCall]:
    """The calls in a value: one, or a list of them."""
    calls = []
    for values in value if isinstance(value, list) else [value]:
        if not isinstance(values, dict) or "name" not in values:
            continue
        arguments = values.get("arguments", values.get("parameters", {}))  # the key that Llama writes
        written = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append(ToolCall(f"call_{turn}_", str(values["name"]), written))
    return calls


def _numbered(calls: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(f"{c.id}{i}", c.name, c.arguments) for i, c in enumerate(calls))


def _function(spec: ToolSpec) -> Turn:
    return {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}


def _plain_turn(message: Message) -> Turn:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
    calls = [f'<tool_call>{{"name": "{c.name}", "arguments": {c.arguments}}}</tool_call>' for c in message.tool_calls]
    return {"role": message.role, "content": "\n".join([message.text, *calls] if message.text else calls)}


def _native_turn(message: Message) -> Turn:
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
    """The value of JSON arguments, for a template writes them as JSON again; invalid JSON stays text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
