"""Answers from a store's documents alone, with quotes and their places; code checks each against the text."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from agentmesh import Agent, Context
from agentmesh.message import user
from agentmesh.rag.search import Passage
from agentmesh_agents.reader import first_line
from agentmesh_tools.retrieve import Consulted, Quote, in_store, occurs, sequence
from agentmesh_tools.sentences import one_line

CITED = re.compile(r"\s*\[(\d+)\]")
IN_MARKS = re.compile(r"[\"“]([^\"“”]{8,})[\"”]")
ENDS = re.compile(r"(?<=[.!?。！？])\s+|(?<=[。！？])|(?<=\])\s+(?=[A-Z])")
NOTHING = "The documents say nothing about this."
NOT_FOUND = "not found"
MIN_PAIRS = 0.4  # of neighbouring words: the right words in another order may say something else


class QuotedAnswer(BaseModel):
    """An answer and the quotes that support it.

    Args:
        text: the sentences of the model that the quotes support; where there are none, a line that introduces the quotes.
        quotes: each is `[start:end]` of the text of its source.
        found: False where the documents do not answer the question.
    """

    text: str
    quotes: list[Quote] = []
    found: bool = True

    def page(self) -> str:
        """The answer as text, with its quotes below."""
        lines = [f"[{i}] “{one_line(q.text)}”\n    {q.source}:{q.start}" for i, q in enumerate(self.quotes, 1)]
        return "\n\n".join([self.text, *lines])


class Librarian(Agent[QuotedAnswer]):
    """Answers a question from the documents of a store, or says that they do not answer it.

    Args:
        store: the store's folder.
        embed: the embedder; the store's own when left out.
        where: a filter that a model neither sees nor changes, such as `{"tenant": "a"}`.
        k: passages that are searched for.
        quotes: sentences that the model is shown, the best of those passages.
        least: the lowest score of the best sentence at which there is an answer: its cosine, and up to 0.5 for shared words.
        borne: the share of an answered sentence's words that must occur in the quotes; else the sentence is left out.
    """

    store: str = ".agentmesh/rag"
    embed: str = ""
    where: dict[str, Any] = {}
    k: int = 5
    quotes: int = 3
    least: float = 0.45
    borne: float = 0.6
    options = {"max_tokens": 80, "temperature": 0}
    instructions = (
        "You answer from the given quotes alone, in one or two short sentences. You cite them by number: [1]."
    )

    def flow(self, task: str, ctx: Context) -> QuotedAnswer:
        """Search; have the model answer from the best sentences; keep what those sentences support."""
        consulted = ctx.do(in_store(self.store, embed=self.embed, k=self.k, where=self.where).on(task))
        quotes = checked(consulted)[: self.quotes]
        if not quotes or consulted.score < self.least:
            return QuotedAnswer(text=NOTHING, found=False)
        text = ctx.do(self.ask([user(self._request(task, quotes))], plain=True)).text
        if first_line(text).lower().startswith(NOT_FOUND):
            return QuotedAnswer(text=NOTHING, found=False)
        return answer_from(text, quotes, consulted.passages, borne=self.borne)

    def _request(self, question: str, quotes: Sequence[Quote]) -> str:
        lines = "\n".join(f"[{i}] {one_line(q.text)}" for i, q in enumerate(quotes, 1))
        return f"{lines}\n\nQuestion: {question}\n\nAnswer in one sentence, with the words of these quotes, or write: {NOT_FOUND}."


def checked(consulted: Consulted) -> list[Quote]:
    """The quotes that occur in one of the passages, word for word and at their place."""
    return [q for q in consulted.quotes if any(occurs(q, p) for p in consulted.passages)]


def answer_from(reply: str, quotes: Sequence[Quote], passages: Sequence[Passage], *, borne: float) -> QuotedAnswer:
    """A model's reply, checked against the documents.

    A sentence stays when most of its words are in the quotes, and all that it puts in quotation marks is in the passages.
    A citation stays when there is such a quote. What the model put in quotation marks is added to the quotes.

    Args:
        borne: the share of a sentence's words that must be in the quotes.
    """
    supported = [s.strip() for s in ENDS.split(reply.strip()) if s.strip() and _supports(s, quotes, passages, borne)]
    cited = sorted({int(n) for s in supported for n in CITED.findall(s) if 1 <= int(n) <= len(quotes)})
    shown = [quotes[n - 1] for n in cited] or list(quotes[:2])
    own = [locate(text, passages) for s in supported for text in IN_MARKS.findall(s)]
    shown += [q for q in own if q is not None and q not in shown]
    numbers = {n: i for i, n in enumerate(cited, 1)}
    text = " ".join(_renumbered(s, numbers).strip() for s in supported)
    return QuotedAnswer(text=text or "The documents say:", quotes=shown)


def _supports(sentence: str, quotes: Sequence[Quote], passages: Sequence[Passage], borne: float) -> bool:
    """Whether most of a sentence's words are in the quotes, and neighbours among them in the same order."""
    own = sequence(CITED.sub("", sentence))
    if not own or any(locate(text, passages) is None for text in IN_MARKS.findall(sentence)):
        return False
    quoted = [sequence(q.text) for q in quotes]
    near = {pair for q in quoted for gap in (1, 2) for pair in zip(q, q[gap:], strict=False)}
    pairs = list(pairwise(own))
    shared = sum(any(word in q for q in quoted) for word in own)
    return shared >= borne * len(own) and sum(pair in near for pair in pairs) >= MIN_PAIRS * len(pairs)


def _renumbered(sentence: str, numbers: dict[int, int]) -> str:
    return CITED.sub(lambda m: f" [{numbers[int(m[1])]}]" if int(m[1]) in numbers else "", sentence)


def locate(text: str, passages: Sequence[Passage]) -> Quote | None:
    """Where these words occur in the passages, whatever white space is between them; None where they do not."""
    pieces = [re.escape(word) for word in text.strip(" .,;:").split()]
    for passage in passages:
        match = re.search(r"\s+".join(pieces), passage.text, re.IGNORECASE) if pieces else None
        if match:
            start = passage.start + match.start()
            return Quote(text=match.group(), source=passage.source, start=start, end=start + len(match.group()))
    return None
