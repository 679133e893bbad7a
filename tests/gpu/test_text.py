"""Detokenisation in pieces gives the same text as all at once."""

import random

import pytest

from agentmesh.inference.tokenization import AnswerPiece, AnswerStream, Detokeniser
from agentmesh.model import RetryLater
from agentmesh.testing.tiny_models import make_tokenizer

TOKENIZER = make_tokenizer()
HARD = "naïve 日本 🙂 e\u0301 — ok"


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def told(
    text: str, *, step: int = 1, stops: tuple[str, ...] = (), thinking: bool = False
) -> tuple[list[AnswerPiece], AnswerStream]:
    """What is told when the text comes so many tokens at a time."""
    pieces: list[AnswerPiece] = []
    telling, tokens = AnswerStream(TOKENIZER, stops=stops, thinking=thinking, tell=pieces.append), ids(text)
    for end in range(step, len(tokens) + 1, step):
        if telling.feed(tokens[:end]):
            break
    telling.finish(tokens)
    return pieces, telling


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_no_half_character_is_ever_told(step: int) -> None:
    pieces, telling = told(HARD, step=step)
    assert "".join(p.text for p in pieces) == telling.text == HARD
    assert not any("\ufffd" in p.text for p in pieces)


def test_what_ends_in_half_a_character_says_so_at_the_end() -> None:
    detokeniser, tokens = Detokeniser(TOKENIZER.decode), ids("a🙂")[:-1]
    said = [detokeniser.more(tokens[: n + 1]) for n in range(len(tokens))]
    assert "".join(said) == "a"
    assert detokeniser.more(tokens, last=True) == "\ufffd"
    assert detokeniser.more(tokens, last=True) == ""


def test_random_bytes_come_out_as_they_would_at_once() -> None:
    draw = random.Random(3)
    for _ in range(30):
        tokens = [draw.randrange(3, 259) for _ in range(40)]
        telling = AnswerStream(TOKENIZER)
        for end in range(1, 41):
            telling.feed(tokens[:end])
        telling.finish(tokens)
        assert telling.text == TOKENIZER.decode(tokens).lstrip("\n") or telling.text == TOKENIZER.decode(tokens)


@pytest.mark.parametrize("step", [1, 4])
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_told(step: int) -> None:
    pieces, telling = told("one two END three", step=step, stops=("END", "E-"))
    assert telling.ended
    assert "".join(p.text for p in pieces) == telling.text == "one two "
    pieces, telling = told("one EN", step=step, stops=("END",))
    assert (telling.text, telling.ended) == ("one EN", False)


@pytest.mark.parametrize("step", [1, 5])
def test_reasoning_is_told_apart(step: int) -> None:
    pieces, telling = told("<think>\nhm < 3</think>\n\nIt is <b>3</b>.", step=step)
    assert (telling.thought, telling.text) == ("\nhm < 3", "It is <b>3</b>.")
    assert {p.kind for p in pieces} == {"thought", "text"}
    assert "".join(p.text for p in pieces if p.kind == "text") == telling.text


def test_a_prompt_that_ends_in_reasoning_goes_on_with_it() -> None:
    _, telling = told("so</think>yes", thinking=True, stops=("s",))
    assert (telling.thought, telling.text, telling.ended) == ("so", "ye", True)
    _, telling = told("and on and on", thinking=True)
    assert (telling.thought, telling.text) == ("and on and on", "")


@pytest.mark.parametrize("text", ["  <thin", "<thought>", "< think>", " a<think>b</think>c"])
def test_what_is_no_reasoning_is_text(text: str) -> None:
    assert told(text)[1].text == text


def test_an_answer_that_begins_again_is_not_told_twice() -> None:
    pieces: list[AnswerPiece] = []
    telling, tokens = AnswerStream(TOKENIZER, tell=pieces.append), ids("hello")
    for end in (1, 2, 3, 1, 2, 3, 4, 5):
        telling.feed(tokens[:end])
    telling.finish(tokens)
    assert "".join(p.text for p in pieces) == "hello"


def test_an_answer_that_begins_again_otherwise_is_tried_again() -> None:
    telling = AnswerStream(TOKENIZER)
    telling.feed(ids("hel"))
    with pytest.raises(RetryLater, match="restarted this answer and it came out differently"):
        telling.feed(ids("ha"))
