"""Searches a store of passages, and ranks the sentences of those that are found, with their places."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel

from agentmesh import Tool, tool
from agentmesh.rag.search import Passage
from agentmesh.retriever import Retriever
from agentmesh_tools.sentences import MAX_BYTES, one_line, spans

WORD = re.compile(r"[^\W_]{2,}")
MIN_BYTES = 20  # of a sentence that can be quoted; in bytes, since a Chinese sentence has few characters
WORDS_WEIGHT = 0.5  # what shared words add to a sentence's cosine, at most
LINE_PENALTY = 0.3  # on the score of a row, a title or a line of code, which is short and shares words by chance
COMMON = frozenset(
    re.findall(
        r"\w+",
        """a about all also an and any are as at be been but by can could did do does for from had has have how if in into is
        it its like may more most much my no not of on or our out should so such than that the their them then there these
        they this to up us use used using was we were what when where which who why will with would you your""",
    )
)


class Quote(BaseModel):
    """Words of a document: `text` is `[start:end]` of the text of `source`."""

    text: str
    source: str
    start: int
    end: int


class Consulted(BaseModel):
    """What a search for a question found.

    Args:
        passages: best first.
        quotes: their sentences, best first.
        score: of the best sentence: its cosine, and up to 0.5 for the words that it shares with the question.
    """

    passages: list[Passage] = []
    quotes: list[Quote] = []
    score: float = 0.0


def in_store(
    store: str, *, embed: str = "", k: int = 5, where: Mapping[str, Any] | None = None
) -> Tool[[str], Consulted]:
    """`consult` for one store; the model that calls it neither sees nor changes the filter.

    Args:
        store: the folder; it need not exist before the tool is called.
        k: how many passages.
    """
    retriever = Retriever.open(store, embed=embed)
    if where:
        retriever = retriever.where(where)

    @tool
    def consult(question: str) -> Consulted:
        """The passages that bear on a question, and their sentences that do.

        Args:
            question: what to look for.
        """
        passages = [
            Passage(source=h.source, start=h.start, text=h.text, heading=" > ".join(h.heading))
            for h in retriever.search(question, k)
        ]
        # where two passages overlap, the one that has the whole sentence comes last, and replaces the other
        candidates = sorted((q for p in passages for q in quotable(p)), key=lambda t: t[0].end)
        by_place = {(q.source, q.start): (q, prose) for q, prose in candidates if not _asks(q.text, question)}
        if not by_place:
            return Consulted(passages=passages)
        quotes, prose = map(list, zip(*by_place.values(), strict=True))
        scores = _scores(question, quotes, retriever)
        order = np.argsort(LINE_PENALTY * ~np.array(prose) - scores, kind="stable")
        return Consulted(passages=passages, quotes=[quotes[i] for i in order], score=float(scores[order[0]]))

    return consult


def _scores(question: str, quotes: list[Quote], retriever: Retriever) -> Any:
    """float (n,) for n quotes: the cosine to the question, and the weighted share of its words; frequent words weigh less."""
    embedder = retriever.embedder()
    cosines = embedder.documents([q.text for q in quotes]) @ embedder.query(question)  # (n, d) x (d,) -> (n,)
    question_words, quote_words = words(question), [words(q.text) for q in quotes]
    n = len(quotes)
    weight = {w: math.log1p(n / (1 + sum(w in q for q in quote_words))) for w in question_words}
    whole = sum(weight.values()) or 1.0
    return cosines + WORDS_WEIGHT * np.array([sum(weight[w] for w in question_words & q) / whole for q in quote_words])


def _asks(text: str, question: str) -> bool:
    """Whether a sentence is a question, or repeats this one, and so is not an answer."""
    sentence, repeated = one_line(text).lower(), one_line(question).lower().strip(" ?？")
    return "?" in sentence or "？" in sentence or repeated in sentence


def quotable(passage: Passage) -> Iterator[tuple[Quote, bool]]:
    """The parts of a passage that can be quoted, each with whether it is a sentence, not a row or a line of code."""
    for piece in spans(passage.text, source=passage.source, torn=passage.start > 0):
        text = passage.text[piece.start : piece.end]
        if MIN_BYTES <= len(text.encode()) <= MAX_BYTES and words(text):
            start = passage.start + piece.start
            yield Quote(text=text, source=passage.source, start=start, end=start + len(text)), piece.prose


def sequence(text: str) -> list[str]:
    """The words that carry meaning, in their order, without their endings."""
    return [stem(w) for w in WORD.findall(text.lower()) if w not in COMMON]


def words(text: str) -> set[str]:
    """The words that carry meaning, without their endings."""
    return set(sequence(text))


def stem(word: str) -> str:
    """A word without the commonest English endings; enough to compare, not to read.

    >>> stem("queues"), stem("journaled"), stem("is")
    ('queue', 'journal', 'is')
    """
    for end, least in (("ies", 3), ("ing", 4), ("ed", 4), ("s", 3)):
        if word.endswith(end) and len(word) - len(end) >= least and not word.endswith("ss"):
            return word[: -len(end)] + ("y" if end == "ies" else "")
    return word


def occurs(quote: Quote, passage: Passage) -> bool:
    """Whether the document has these words at this place, as far as the passage shows it."""
    at = quote.start - passage.start
    return (
        quote.source == passage.source and at >= 0 and quote.end == quote.start + len(quote.text)
        and passage.text[at : at + len(quote.text)] == quote.text
    )  # fmt: skip
