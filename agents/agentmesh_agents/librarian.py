"""Answers from a store's documents alone: with quotes and their places, each checked in code against the text."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from agentmesh import Agent, Context
from agentmesh.message import user
from agentmesh.retriever import Passage
from agentmesh_agents.reader import first_line
from agentmesh_tools.retrieve import Consulted, Quote, in_store, sequence, stands
from agentmesh_tools.sentences import one_line

CITED = re.compile(r"\s*\[(\d+)\]")
IN_MARKS = re.compile(r"[\"“]([^\"“”]{8,})[\"”]")
ENDS = re.compile(r"(?<=[.!?。！？])\s+|(?<=[。！？])|(?<=\])\s+(?=[A-Z])")
NOTHING = "The documents say nothing about this."
NOT_FOUND = "not found"
PAIRS_BORNE = 0.4  # of neighbouring words: a sentence of the right words in another order may say anything


class Answer(BaseModel):
    """An answer and the words of the documents that it rests on.

    Args:
        text: what the model said and the quotes bear out; without a model's words, that the documents speak for themselves.
        quotes: each is `[start:end]` of the text of its source.
        found: False where the documents say nothing about the question.
    """

    text: str
    quotes: list[Quote] = []
    found: bool = True

    def page(self) -> str:
        """The answer as a person reads it, with its quotes below."""
        lines = [f"[{i}] “{one_line(q.text)}”\n    {q.source}:{q.start}" for i, q in enumerate(self.quotes, 1)]
        return "\n\n".join([self.text, *lines])


class Librarian(Agent[Answer]):
    """Answers a question from what the store holds, and says so when it holds nothing.

    Args:
        store: the store's folder.
        embed: the embedder; the store's own when left out.
        where: a filter that no model sees or widens, such as `{"tenant": "a"}`.
        k: passages that are looked at.
        quotes: sentences that the model is shown, the best of those passages.
        least: how near the best sentence must be, else nothing was found: its cosine, and up to 0.5 for shared words.
        borne: the share of a sentence's words that the quotes must hold, else the sentence is left out.
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

    def flow(self, task: str, ctx: Context) -> Answer:
        """Look it up; have the best sentences put into words; keep of these what the sentences bear out."""
        consulted = ctx.do(in_store(self.store, embed=self.embed, k=self.k, where=self.where).on(task))
        quotes = checked(consulted)[: self.quotes]
        if not quotes or consulted.score < self.least:
            return Answer(text=NOTHING, found=False)
        said = ctx.do(self.ask([user(self._request(task, quotes))], plain=True)).text
        if first_line(said).lower().startswith(NOT_FOUND):
            return Answer(text=NOTHING, found=False)
        return answer_from(said, quotes, consulted.passages, borne=self.borne)

    def _request(self, question: str, quotes: Sequence[Quote]) -> str:
        told = "\n".join(f"[{i}] {one_line(q.text)}" for i, q in enumerate(quotes, 1))
        return f"{told}\n\nQuestion: {question}\n\nAnswer in one sentence, with the words of these quotes, or write: {NOT_FOUND}."


def checked(consulted: Consulted) -> list[Quote]:
    """The quotes that stand in one of the passages, word for word and at their place."""
    return [q for q in consulted.quotes if any(stands(q, p) for p in consulted.passages)]


def answer_from(said: str, quotes: Sequence[Quote], passages: Sequence[Passage], *, borne: float) -> Answer:
    """What a model said, held against the documents.

    A sentence stays when the quotes hold most of its words, and all that it puts in quotation marks is in the passages;
    a citation stays when there is such a quote. Quotes that the model marked as words of the documents are added.
    """
    kept = [s.strip() for s in ENDS.split(said.strip()) if s.strip() and _bears(s, quotes, passages, borne)]
    cited = sorted({int(n) for s in kept for n in CITED.findall(s) if 1 <= int(n) <= len(quotes)})
    shown = [quotes[n - 1] for n in cited] or list(quotes[:2])
    own = [locate(text, passages) for s in kept for text in IN_MARKS.findall(s)]
    shown += [q for q in own if q is not None and q not in shown]
    numbers = {n: i for i, n in enumerate(cited, 1)}
    text = " ".join(_renumbered(s, numbers).strip() for s in kept)
    return Answer(text=text or "The documents say:", quotes=shown)


def _bears(sentence: str, quotes: Sequence[Quote], passages: Sequence[Passage], borne: float) -> bool:
    """Whether the quotes hold most of a sentence's words, and neighbours among them in the same order: it is no invention."""
    said = sequence(CITED.sub("", sentence))
    if not said or any(locate(text, passages) is None for text in IN_MARKS.findall(sentence)):
        return False
    held = [sequence(q.text) for q in quotes]
    near = {pair for h in held for gap in (1, 2) for pair in zip(h, h[gap:], strict=False)}
    pairs = list(pairwise(said))
    known = sum(any(word in h for h in held) for word in said)
    return known >= borne * len(said) and sum(pair in near for pair in pairs) >= PAIRS_BORNE * len(pairs)


def _renumbered(sentence: str, numbers: dict[int, int]) -> str:
    return CITED.sub(lambda m: f" [{numbers[int(m[1])]}]" if int(m[1]) in numbers else "", sentence)


def locate(text: str, passages: Sequence[Passage]) -> Quote | None:
    """Where these words stand in the passages, spaces and line ends apart; None where they do not."""
    pieces = [re.escape(word) for word in text.strip(" .,;:").split()]
    for passage in passages:
        found = re.search(r"\s+".join(pieces), passage.text, re.IGNORECASE) if pieces else None
        if found:
            start = passage.start + found.start()
            return Quote(text=found.group(), source=passage.source, start=start, end=start + len(found.group()))
    return None
