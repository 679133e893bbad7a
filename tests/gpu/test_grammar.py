"""Constrained decoding: whatever a random model draws, the answer meets the grammar."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.grammar import Grammars, bound_strings, grammar_of
from agentmesh.inference.request import Done, InferenceRequest
from agentmesh.message import ToolSpec
from agentmesh.models.tool_call_parser import parse_tool_calls
from agentmesh.testing.tiny_models import END, make_tokenizer

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
POINT = {
    "type": "object",
    "properties": {"x": {"type": "boolean"}, "y": {"enum": ["N", "S"]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
LOOK = ToolSpec("look", "Look.", POINT)
GO = ToolSpec("go", "Go.", {"type": "object", "properties": {"to": {"$ref": "#/$defs/way"}}, "required": ["to"],
                            "additionalProperties": False, "$defs": {"way": {"enum": ["up", "down"]}}})  # fmt: skip
WAIT_S = 30
Say = Callable[..., list[str]]


@pytest.fixture(params=[(), TAGS], ids=["tags as text", "tags as tokens"])
def say(request: pytest.FixtureRequest, engine: InferenceEngine) -> Say:
    """Twelve answers drawn at random under a grammar."""
    tokenizer = make_tokenizer(more=request.param)
    grammars = Grammars(tokenizer, engine.room.vocabulary, [END])
    assert grammars.tags_are_tokens == bool(request.param)

    def told(*what: Any, temperature: float = 9.0, thinking: bool = False, most: int = 200) -> list[str]:
        grammar = grammar_of(*what, tags_are_tokens=grammars.tags_are_tokens)
        asked = [
            engine.submit(InferenceRequest(
                (5, 6, 7), most, frozenset({END}), temperature, seed=s,
                constraint=grammars.constraint(grammar, thinking=thinking),
            ))
            for s in range(12)
        ]  # fmt: skip
        done: list[Done] = [f.result(WAIT_S) for f in asked]
        return [tokenizer.decode(d.tokens) for d in done if d.finish == "stop"]

    return told


def test_an_answer_meets_its_schema(say: Say) -> None:
    answers = say((), POINT)
    assert answers
    for text in answers:
        thought, _, rest = text.rpartition("</think>")
        assert not thought or thought.startswith("<think>")
        assert set(json.loads(rest)) == {"x", "y"}


def test_a_tool_must_be_called(say: Say) -> None:
    answers = say([LOOK, GO], None, "required")
    assert answers
    for text in answers:
        rest, calls = parse_tool_calls(text.rpartition("</think>")[2], [LOOK, GO], turn=1)
        assert not rest
        assert {c.name for c in calls} <= {"look", "go"}
        assert all(json.loads(c.arguments) for c in calls)


def test_a_named_tool_must_be_called_once(say: Say) -> None:
    for text in say([LOOK, GO], None, "go"):
        (call,) = parse_tool_calls(text.rpartition("</think>")[2], [LOOK, GO], turn=1)[1]
        assert call.name == "go"
        assert json.loads(call.arguments)["to"] in ("up", "down")


def test_a_tool_is_called_or_the_schema_met(say: Say) -> None:
    for text in say([LOOK], {"type": "object", "properties": {"n": {"type": "null"}}, "additionalProperties": False}):
        rest, calls = parse_tool_calls(text.rpartition("</think>")[2], [LOOK], turn=1)
        assert calls or json.loads(rest) in ({}, {"n": None})


def test_free_text_is_free_until_a_call_is_opened() -> None:
    for more in ((), TAGS):
        tokenizer = make_tokenizer(more=more)
        grammars = Grammars(tokenizer, 300)
        grammar = grammar_of([GO], None, tags_are_tokens=bool(more))

        def may(text: str, grammars: Grammars = grammars, grammar: str = grammar, tokenizer: Any = tokenizer) -> bool:
            constraint = grammars.constraint(grammar)
            for token in tokenizer(text)["input_ids"]:
                allowed = constraint.allowed(300)
                if allowed is not None and not allowed[token]:
                    return False
                constraint.take([token])
            allowed = constraint.allowed(300)
            return allowed is None or bool(allowed[END])

        assert may("any <b>text</b> {with} 日本")
        assert may('So: <tool_call>\n{"name": "go", "arguments": {"to": "up"}}\n</tool_call>')
        assert may('<tool_call>{"name": "go", "arguments": {"to": "up"}}</tool_call> and more')
        assert not may('<tool_call>{"name": "go", "arguments": {"to": "left"}}</tool_call>')
        assert not may('<tool_call>{"name": "stay"')
        if more:
            assert may("<think>free < too</think>yes")
    assert grammar_of([GO], None, "none") == grammar_of([], None) == ""


def test_reasoning_is_free_and_the_grammar_begins_after_it() -> None:
    tokenizer = make_tokenizer(more=TAGS)
    constraint = Grammars(tokenizer, 300, [END]).constraint(grammar_of((), POINT), thinking=True)
    free = constraint.allowed(300)
    assert free is not None
    assert free.sum() == 299  # all but the end
    constraint.take(tokenizer("anything at all</think>")["input_ids"])
    allowed = constraint.allowed(300)
    assert allowed is not None
    assert {tokenizer.decode([i]) for i in allowed.nonzero()[0]} <= {"{", " ", "\n"}
    constraint.reset()
    assert constraint.allowed(300) is free


def test_strings_get_a_length_and_nothing_else_is_changed() -> None:
    schema = {"anyOf": [{"type": "string"}, {"type": "string", "maxLength": 3}, {"type": "string", "enum": ["a"]}]}
    assert bound_strings(schema)["anyOf"] == [{"type": "string", "maxLength": 2000}, *schema["anyOf"][1:]]


def test_a_grammar_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="."):
        Grammars(make_tokenizer(), 300).constraint('start: %json {"type": "nonsense"}')


def test_a_constrained_answer_draws_the_same_in_company_and_after_eviction(
    make_engine: Callable[..., InferenceEngine],
) -> None:
    tokenizer = make_tokenizer()

    def drawn(engine: InferenceEngine, n: int) -> list[Done]:
        grammars = Grammars(tokenizer, engine.room.vocabulary)
        grammar = grammar_of((), {"type": "array", "items": {"type": "integer"}, "minItems": 30})
        return [f.result(WAIT_S) for f in [
            engine.submit(InferenceRequest(tuple(range(3, 23)), 70, temperature=1.0, seed=s, constraint=grammars.constraint(grammar)))
            for s in range(n)
        ]]  # fmt: skip

    alone = [d.tokens for d in drawn(make_engine(), 6)]
    tight = make_engine(Shape(pages=12, page_tokens=16, batch_tokens=64, batch_requests=8))
    assert [d.tokens for d in drawn(tight, 6)] == alone
