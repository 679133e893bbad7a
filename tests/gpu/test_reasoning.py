"""Reasoning and stop strings at their boundaries: the streamed text does not depend on how the tokens arrive."""

import json

import pytest

from agentmesh.inference.grammar import Grammars, grammar_of
from agentmesh.inference.tokenization import AnswerStream
from agentmesh.testing.tiny_models import END, VOCABULARY, make_tokenizer

TOKENIZER = make_tokenizer()


def told(text: str, step: int, *stops: str, thinking: bool = False) -> AnswerStream:
    telling, tokens = AnswerStream(TOKENIZER, stops=stops, thinking=thinking), TOKENIZER(text)["input_ids"]
    for end in range(step, len(tokens) + 1, step):
        if telling.feed(tokens[:end]):
            break
    telling.finish(tokens)
    return telling


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("<think></think>\n\nHi", "", "Hi"),
        ("<think>\n\n</think>\n\n Hi", "\n\n", "Hi"),
        ("<think>a</think><think>b</think>c", "a", "<think>b</think>c"),
        ("<think>a<think>b</think>c", "a<think>b", "c"),
        ("<think>never closed </thin", "never closed </thin", ""),
        (" \n<think>a</think>", "a", ""),
        ("</think>a", "", "</think>a"),
        ("<think>日本🙂</think>🙂e\u0301", "日本🙂", "🙂e\u0301"),
        ("\ufeff\u0645\u0631\u062d\u0628\u0627", "", "\ufeff\u0645\u0631\u062d\u0628\u0627"),
        ("", "", ""),
    ],
)
def test_reasoning_is_the_same_however_its_tokens_come(text: str, thought: str, said: str, step: int) -> None:
    telling = told(text, step)
    assert (telling.thought, telling.text) == (thought, said)


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "stop", "said"),
    [
        ("<", "<", ""),
        ("\n", "\n", ""),
        ("a🙂b", "🙂", "a"),
        ("a🙂b", "🙂b", "a"),
        ("日本語です", "語で", "日本"),
        ("<think>x.</think>y.", ".", "y"),
        ("aab", "ab", "a"),
        ("ababac", "abac", "ab"),
    ],
)
def test_a_stop_string_is_never_told(text: str, stop: str, said: str, step: int) -> None:
    telling = told(text, step, stop)
    assert (telling.text, telling.ended) == (said, True)


def test_a_grammar_waits_for_reasoning_whose_tags_are_several_tokens() -> None:
    grammars = Grammars(TOKENIZER, VOCABULARY, [END])
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    asked = grammar_of((), schema)
    constraint = grammars.constraint(asked, thinking=True)
    for token in TOKENIZER('so {"a": </thi <b>\n</think>\n\n{"x": true}')["input_ids"]:
        allowed = constraint.allowed(VOCABULARY)
        assert allowed is not None
        assert allowed[token]
        constraint.take([token])
    free = grammars.constraint(asked, thinking=True).allowed(VOCABULARY)
    assert free is not None
    assert free[TOKENIZER("so")["input_ids"]].all()
    assert not free[END]


def test_json_is_what_comes_after_it() -> None:
    telling = told('so</think>\n\n{"x": true}', 1, thinking=True)
    assert json.loads(telling.text) == {"x": True}
