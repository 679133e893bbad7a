"""The exact prompts that a model gets by templates of several kinds, and the parsing of its output."""

from typing import Any

import pytest

from agentmesh.message import Message, ToolCall, ToolSpec, system, user
from agentmesh.model import Prompt
from agentmesh.models.tool_call_parser import chat_turns, parse_tool_calls
from agentmesh.testing.tiny_models import CHATML, make_tokenizer

LOOK = ToolSpec("look", "Look at it.", {"type": "object", "properties": {"at": {"type": "string"}}})
TURNS = [
    system("Be brief."),
    user("Go."),
    Message("assistant", "", (ToolCall("c", "look", '{"at": "x"}'),)),
    Message("tool", "a wall", tool_call_id="c"),
]
# as Qwen writes it, shortened
HERMES = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n<tools>{% for t in tools %}{{ '\\n' }}{{ t | tojson }}{% endfor %}{{ '\\n' }}</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "<|im_end|>\n{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    '{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Gemma's: no system role
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
SPEC = (
    '{"name":"look","description":"Look at it.","parameters":{"type":"object","properties":{"at":{"type":"string"}}}}'
)
TOLD = (
    f"You may call these tools:\n{SPEC}\n"
    'To call one, answer with <tool_call>{"name": NAME, "arguments": {...}}</tool_call> and nothing else.'
)
GOLDEN = {
    "tools by the template": (
        HERMES, True, "<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "look", "description": "Look at it.", "parameters": '
        '{"type": "object", "properties": {"at": {"type": "string"}}}}}\n</tools><|im_end|>\n'
        '<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\na wall\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "tools as text": (
        CHATML, True, f"<|im_start|>system\nBe brief.\n\n{TOLD}<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\na wall\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ),
    "no system role": (
        NO_SYSTEM, False, f"<turn>user\nBe brief.\n\n{TOLD}\n\nGo.</turn>\n"
        '<turn>assistant\n<tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call></turn>\n'
        "<turn>user\n<tool_response>\na wall\n</tool_response></turn>\n<turn>model\n",
    ),
}  # fmt: skip


def written(
    template: str, turns: list[Message], tools: list[ToolSpec], *, takes_system: bool, output: Any = None
) -> str:
    messages, given = chat_turns(Prompt("m", turns, tools, output), template=template, takes_system=takes_system)
    tokenizer = make_tokenizer(template)
    return str(tokenizer.apply_chat_template(messages, tools=given, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_conversation_with_tools_is_written_so(kind: str) -> None:
    template, takes_system, wanted = GOLDEN[kind]
    assert written(template, TURNS, [LOOK], takes_system=takes_system) == wanted


def test_a_plain_conversation_is_left_alone() -> None:
    assert written(NO_SYSTEM, [user("Hi.")], [], takes_system=False) == "<turn>user\nHi.</turn>\n<turn>model\n"
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n"
    assert written(CHATML, TURNS[:2], [], takes_system=True) == asked
    assert written(NO_SYSTEM, TURNS[:1], [], takes_system=False) == "<turn>user\nBe brief.</turn>\n<turn>model\n"


def test_a_wanted_schema_is_told_too() -> None:
    text = written(CHATML, [user("Go.")], [], takes_system=True, output={"type": "integer"})
    assert text.startswith(
        '<|im_start|>system\nAnswer with JSON alone that meets this JSON Schema:\n{"type":"integer"}<|im_end|>\n'
    )


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        ('```json\n{"name": "look", "arguments": {"at": "x"}}\n```', "", [("look", '{"at": "x"}')]),
        ('Let me.\n```\n{"name": "look", "parameters": {}}\n```\n', "Let me.", [("look", "{}")]),
        (' {"name": "look", "arguments": {"at": "x"}} ', "", [("look", '{"at": "x"}')]),
        ('[{"name": "look"}, {"name": "look", "arguments": {"at": "y"}}]', "", [("look", "{}"), ("look", '{"at": "y"}')]),
        ('{"name": "Ann", "arguments": "none"}', '{"name": "Ann", "arguments": "none"}', []),
        ('{"at": "x"}', '{"at": "x"}', []),
        ("```python\nprint()\n```", "```python\nprint()\n```", []),
        ('<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', "", [("nobody", "{}")]),
    ],
)  # fmt: skip
def test_calls_are_read_from_fences_and_bare_json_where_they_name_a_tool(
    text: str, rest: str, calls: list[tuple[str, str]]
) -> None:
    said, asked = parse_tool_calls(text, [LOOK], turn=2)
    assert (said, [(c.name, c.arguments) for c in asked]) == (rest, calls)
    assert [c.id for c in asked] == [f"call_2_{i}" for i in range(len(calls))]
