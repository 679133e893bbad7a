"""A tool call that `max_tokens` cut off is not an answer: the caller is told, and the model calls again."""

import pytest

from agentmesh.inference.request import Done, InferenceRequest
from agentmesh.inference.tokenization import AnswerStream
from agentmesh.message import ToolSpec, user
from agentmesh.model import Prompt
from agentmesh.models.local import _answer
from agentmesh.models.tool_call_parser import parse_tool_calls
from agentmesh.testing.tiny_models import make_tokenizer

LOOK = ToolSpec("look", "Look.", {"type": "object", "properties": {"at": {"type": "string"}}})


@pytest.mark.parametrize(
    ("text", "rest", "calls"),
    [
        ('<tool_call>{"name": "look", "arguments": {"at": "x', "", [("look", '{"at": "x')]),
        ('Hm.\n<tool_call>\n{"name": "look", "arguments": ', "Hm.", [("look", "{")]),  # not to be called with none
        ('<tool_call>{"name": "look", "arguments": {"at": "x"}', "", [("look", '{"at": "x"}')]),
        (
            '<tool_call>{"name": "look", "arguments": {}}</tool_call><tool_call>{"name": "look", "arguments": {"a',
            "", [("look", "{}"), ("look", '{"a')],
        ),
        ('<tool_call>{"name": "nobody", "arguments": {"at', '<tool_call>{"name": "nobody", "arguments": {"at', []),
        ('<tool_call>{"name": "lo', '<tool_call>{"name": "lo', []),
        ('<tool_call>{"name": "look", "arguments": {"at</tool_call>', None, []),
    ],
)  # fmt: skip
def test_what_was_cut_off_in_its_arguments_is_a_call(text: str, rest: str | None, calls: list[tuple[str, str]]) -> None:
    said, asked = parse_tool_calls(text, [LOOK], turn=2)
    assert (said, [(c.name, c.arguments) for c in asked]) == (text if rest is None else rest, calls)
    assert [c.id for c in asked] == [f"call_2_{i}" for i in range(len(calls))]


def test_the_answer_says_that_it_was_cut_off() -> None:
    telling, text = AnswerStream(make_tokenizer()), '<tool_call>{"name": "look", "arguments": {"at": "x'
    telling.finish(make_tokenizer()(text)["input_ids"])
    answer = _answer(Prompt("tiny", [user("?")], [LOOK]), InferenceRequest((5,), 8), telling, Done((6,), "length"))
    assert answer.finish == "length"
    assert [c.arguments for c in answer.message.tool_calls] == ['{"at": "x']
