"""Sentences of plain text and Markdown, and the lines that are not sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmesh_tools.sentences import one_line, spans


def prose(text: str, **options: object) -> list[str]:
    return [text[p.start : p.end] for p in spans(text, **options) if p.prose]  # type: ignore[arg-type]


def lines(text: str, **options: object) -> list[str]:
    return [text[p.start : p.end] for p in spans(text, **options) if not p.prose]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A paragraph that\nis wrapped. Another\none of it!", ["A paragraph that\nis wrapped.", "Another\none of it!"]),
        ("One without a mark\n\nAnother one", ["One without a mark", "Another one"]),
        ("It is 3.5 m, e.g. Oak, i.e. wood vs. steel, by J. Doe. Then", ["It is 3.5 m, e.g. Oak, i.e. wood vs. steel, by J. Doe.", "Then"]),
        ("Oak, etc. is wood. Oak, etc. It burns.", ["Oak, etc. is wood.", "Oak, etc.", "It burns."]),
        ("See `a.b.c` in v1.2.x. **So it is.** (And so.) “Yes.” Done",
         ["See `a.b.c` in v1.2.x.", "**So it is.**", "(And so.)", "“Yes.”", "Done"]),
        ("工资在月底支付。加班费\n下个月支付！好吗？", ["工资在月底支付。", "加班费\n下个月支付！", "好吗？"]),
        ("Lead:\n- one thing\n  goes on\n- two. And\n1. three\n   * nested\n\n     still nested",
         ["Lead:", "one thing\n  goes on", "two.", "And", "three", "nested", "still nested"]),
        ("> Quoted words.\n>\n> More words.", ["Quoted words.", "More words."]),
        ("[x] stands. ```so``` does.\n```so``` too.", ["[x] stands.", "```so``` does.", "```so``` too."]),
        ("", []),
        ("...", ["..."]),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert prose(text) == expected
    assert lines(text) == []


def test_a_sentence_on_one_line() -> None:
    (text,) = prose("> Quoted words that\n>   are  wrapped.")
    assert one_line(text) == "Quoted words that are wrapped."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# A title\nWords.\n\n### Another #", ["A title", "Another"]),
        ("Title\n=====\nWords.\n\nSecond\n------\n\nThird\n~~~~~\nMore words.", ["Title", "Second", "Third"]),
        ("Words.\n| who | what |\n|:--|--:|\n| a | b |\nMore.", ["a | b"]),
        ("Words:\n```python\nx = 1\n\n# note\n```\nMore.\n\n~~~\ny = 2.\n~~~", ["x = 1", "note", "y = 2."]),
        ("Words:\n\n    pip install it. Now.\n\nMore.", ["pip install it. Now."]),
        ("Words.\n\n---\n\n* * *\n<!-- hidden -->\nMore.", ["<!-- hidden --"]),
    ],
)
def test_rows_headings_and_code_are_not_sentences(text: str, expected: list[str]) -> None:
    assert lines(text) == expected


def test_files_of_code_and_rows_are_split_into_lines() -> None:
    text = "# It counts.\ncount: 3\n\nx = f(1). y"
    for name in ("a.py", "docs/A.YAML", "rows.csv"):
        assert (prose(text, source=name), lines(text, source=name)) == ([], ["It counts.", "count: 3", "x = f(1). y"])


def test_a_passage_that_begins_and_ends_inside_a_sentence() -> None:
    text = "of the sentence before. A whole one. This one is\nnot at its"
    assert prose(text, torn=True) == ["A whole one."]
    assert lines(text, torn=True) == ["of the sentence before.", "This one is\nnot at its"]
    inside = "x = 1\n```\nWords.\n\n```python\ny = 2\n```"
    assert (prose(inside, torn=True), lines(inside, torn=True)) == (["Words."], ["x = 1", "y = 2"])
    whole = "Words.\n\n```\ny = 2\n```\nMore."
    assert (prose(whole, torn=True), lines(whole, torn=True)) == (["Words.", "More."], ["y = 2"])


def test_a_text_without_sentence_ends_is_split_into_lines() -> None:
    text = "\n".join(f"line {i} of a text without any mark" for i in range(60))
    assert lines(text) == text.split("\n")


@given(st.text(alphabet="aB1 .!?。\n\t|#>-*`~=()[]", max_size=60), st.booleans())
def test_pieces_are_in_order_and_do_not_overlap(text: str, torn: bool) -> None:
    last_end = 0
    for p in spans(text, torn=torn):
        assert last_end <= p.start < p.end <= len(text)
        assert text[p.start : p.end] == text[p.start : p.end].strip()
        last_end = p.end
