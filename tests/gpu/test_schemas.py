"""Schemas as people and servers of tools write them: each holds an answer as far as a grammar can."""

import logging
from typing import Any

import pytest
from pydantic import BaseModel

from agentmesh.inference import grammar
from agentmesh.inference.grammar import Constraint, Grammars, bound_strings, grammar_of
from agentmesh.message import ToolSpec
from agentmesh.testing.tiny_models import END, VOCABULARY, make_tokenizer

TOKENIZER = make_tokenizer()
GRAMMARS = Grammars(TOKENIZER, VOCABULARY, [END])


class Found(BaseModel):
    """What pydantic makes `uniqueItems` of."""

    tags: set[int]


def takes(constraint: Constraint, text: str) -> bool:
    """Whether it may be said, and end there."""
    for token in [*TOKENIZER(text)["input_ids"], END]:
        allowed = constraint.allowed(VOCABULARY)
        if allowed is None or not allowed[token]:
            return False
        constraint.take([token])
    return True


def holds(schema: dict[str, Any], good: str, bad: str) -> bool:
    return takes(GRAMMARS.constraint(grammar_of((), schema)), good) and not takes(
        GRAMMARS.constraint(grammar_of((), schema)), bad
    )


def test_what_a_grammar_cannot_say_does_not_undo_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert holds(Found.model_json_schema(), '{"tags": [1, 2]}', '{"tags": ["a"]}')
    assert 'the grammar does not enforce all of this schema: Unimplemented keys: ["uniqueItems"]' in caplog.text
    assert holds({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1.5", '"a"')
    assert holds({"type": "string", "format": "of a tool's own"}, '"a"', "1")


def test_one_tool_s_odd_schema_leaves_the_others_held() -> None:
    odd = ToolSpec("odd", "", {"type": "object", "properties": {"x": {"type": "string", "not": {"const": "b"}}}})
    go = ToolSpec("go", "", {"type": "object", "properties": {"to": {"enum": ["N", "S"]}}, "required": ["to"]})
    call = '<tool_call>{"name": "go", "arguments": {"to": "%s"}}</tool_call>'
    asked = grammar_of([odd, go], None, "required")
    assert takes(GRAMMARS.constraint(asked), call % "N")
    assert not takes(GRAMMARS.constraint(asked), call % "E")


def test_strings_get_a_length_that_leaves_the_schema_possible() -> None:
    assert bound_strings({"type": ["string", "null"]})["maxLength"] == grammar.MAX_STRING
    assert bound_strings({"type": "string", "minLength": 5000})["maxLength"] == 5000
    values = {"const": {"type": "string"}, "enum": [{"type": "string"}], "default": {"type": "string"}}
    assert bound_strings(values) == values  # no schemas
    named = {"properties": {"enum": {"type": "string"}}}
    assert bound_strings(named)["properties"]["enum"]["maxLength"] == grammar.MAX_STRING


def test_a_grammar_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[str]()
    compiled = grammar.llguidance.LLMatcher
    monkeypatch.setattr(grammar.llguidance, "LLMatcher", lambda *a, **k: made.append(a[1]) or compiled(*a, **k))
    grammars = Grammars(TOKENIZER, VOCABULARY, [END])
    asked = grammar_of((), {"type": "boolean"})
    first, second = grammars.constraint(asked), grammars.constraint(asked)
    assert takes(first, "true")
    assert takes(second, "false")  # each follows its own answer
    assert made == [asked]
    for n in range(2 * grammar.CACHED_GRAMMARS):
        grammars.constraint(grammar_of((), {"const": n}))
    assert grammars._compiled.cache_info().currsize == grammar.CACHED_GRAMMARS
