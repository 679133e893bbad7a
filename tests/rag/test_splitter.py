"""Chunks are exact slices of any text; headings are found and attached."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmesh import DefinitionError
from agentmesh.rag.documents import Document, Heading, Part
from agentmesh.rag.loaders import markdown
from agentmesh.rag.splitter import split

WORDS = ["word ", "Sentence. ", "行政院。", "猫", "，", "e\u0301", "👩\u200d👩\u200d👧 ", "x" * 70]
PIECES = [*WORDS, "\t", "\n", "\n\n", "# Title\n", "## Sub\n\n", "```\n# no\n```\n"]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=60).map("".join)


def words(text: str) -> int:
    return len(text.split())


@settings(max_examples=300, deadline=None)
@given(text=texts, size=st.integers(1, 120), overlap=st.integers(0, 119), parts=st.booleans())
def test_every_chunk_is_the_document_at_its_place(text: str, size: int, overlap: int, parts: bool) -> None:
    overlap = min(overlap, size - 1)
    document = markdown(text)
    if parts:
        cut = len(text) // 2
        document = Document(text, document.headings, (Part(0, {"n": 1}, True), Part(cut, {"n": 2}, True)))
    chunks = split(document, "a", size=size, overlap=overlap)
    covered = set()
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end] == chunk.text.strip()
        assert 1 <= len(chunk.text) <= size
        assert chunk.id == f"a#{chunk.start}"
        covered |= set(range(chunk.start, chunk.end))
        if parts:
            assert chunk.metadata["n"] == (1 if chunk.end <= cut else 2)
            assert chunk.start >= cut or chunk.end <= cut
    assert [c.start for c in chunks] == sorted({c.start for c in chunks})
    for before, after in zip(chunks, chunks[1:], strict=False):
        assert before.end < after.end
        assert before.end - after.start <= overlap
    assert all(i in covered for i, c in enumerate(text) if not c.isspace())


@settings(max_examples=100, deadline=None)
@given(text=texts, size=st.integers(1, 20), overlap=st.integers(0, 19))
def test_no_chunk_exceeds_the_size_by_another_measure(text: str, size: int, overlap: int) -> None:
    chunks = split(Document(text), "a", size=size, overlap=min(overlap, size - 1), measure=words)
    assert all(text[c.start : c.end] == c.text and words(c.text) <= size for c in chunks)
    covered = {i for c in chunks for i in range(c.start, c.end)}
    assert all(i in covered for i, c in enumerate(text) if not c.isspace())


def test_a_text_is_cut_at_its_boundaries() -> None:
    text = "First sentence here. Second sentence here.\n\nA new paragraph begins. And it ends.\n" * 3
    chunks = split(Document(text), "a", size=60, overlap=0)
    assert [c.text.split(maxsplit=1)[0] for c in chunks] == ["First", "A"] * 3
    overlapping = split(Document("One is here. Two is here. Three is here. Four is here."), "a", size=28, overlap=16)
    assert [c.text for c in overlapping] == [
        "One is here. Two is here.",
        "Two is here. Three is here.",
        "Three is here. Four is here.",
    ]


def test_chinese_is_cut_after_its_full_stops() -> None:
    text = "机器学习是人工智能的一个分支。它研究如何让计算机从数据中学习。深度学习是其中一种方法！" * 3
    chunks = split(Document(text), "a", size=50, overlap=0)
    assert all(c.text[-1] in "。！" for c in chunks)
    endless = split(Document("猫" * 1000), "a", size=100, overlap=20)
    assert [(c.start, len(c.text)) for c in endless[:3]] == [(0, 100), (80, 100), (160, 100)]


def test_each_chunk_has_the_headings_above_it() -> None:
    text = (
        "# Handbook\n\n## Leave\n\n### Parents\n\n" + "Weeks of leave. " * 30 + "\n\n### Others\n\nNone.\n\n"
        "Travel\n------\n\n" + "By train. " * 40
    )
    chunks = split(markdown(text), "h.md", size=300, overlap=0)
    assert chunks[0].text.startswith("# Handbook")
    assert chunks[0].heading == ("Handbook", "Leave", "Parents")
    by_train = [c for c in chunks if c.text.endswith("By train.")]
    assert {c.heading for c in by_train if "Others" not in c.text} == {("Handbook", "Travel")}
    # small sections share a chunk with what follows, and say where they begin
    (others,) = [c for c in chunks if "None." in c.text]
    assert others.heading == ("Handbook", "Leave", "Others")


def test_which_lines_are_headings() -> None:
    text = (
        "---\ntitle: no\n---\n# One #\n```\n# no\n~~~\n# no\n```\n#no\n    # no\n\nTwo **bold** [link](x)\n===\n"
        "- item\n---\n\nnot\nalone\n---\n\n###### Six\n#\n"
    )
    assert [(h.level, h.text) for h in markdown(text).headings] == [
        (1, "One"),
        (1, "Two bold link"),
        (6, "Six"),
        (1, ""),
    ]


def test_a_rule_at_the_top_is_not_front_matter() -> None:
    assert [h.text for h in markdown("---\n\n# One\n\n---\n\n# Two\n").headings] == ["One", "Two"]
    assert [h.text for h in markdown("---\na: b\n# c\n").headings] == ["c"]


def test_many_headings_take_linear_time() -> None:
    rng = random.Random(1)
    text = "".join(f"{'#' * rng.randint(1, 6)} T{i}\n\n{'word ' * rng.randint(0, 60)}\n\n" for i in range(20_000))
    chunks = split(markdown(text), "big.md")
    assert len(chunks) > 3_000
    assert chunks[-1].heading[-1].startswith("T")


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_sizes_out_of_bounds(size: int, overlap: int) -> None:
    with pytest.raises(DefinitionError, match="choose 0 <= overlap < size"):
        split(Document("text"), "a", size=size, overlap=overlap)


def test_parts_give_their_metadata() -> None:
    document = Document("page one\n\npage two", (Heading(0, 1, "H", 8),), (Part(0, {"page": 1}), Part(10, {"page": 2})))
    one, two = split(document, "a.pdf", size=9, overlap=0, metadata={"team": "a"})
    assert (one.metadata, two.metadata) == ({"page": 1, "team": "a"}, {"page": 2, "team": "a"})
    (both,) = split(document, "a.pdf")
    assert both.text == document.text
