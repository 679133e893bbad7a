"""How well questions find the passages that answer them."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmesh.errors import DefinitionError
from agentmesh.rag.documents import Hit


@dataclass(frozen=True, slots=True)
class Scores:
    """How well questions find their passages.

    Args:
        recall: by k, the share of questions with a right passage among the first k.
        mrr: mean of 1 / the rank of the first right one, 0 where there is none among the first `max(k)`.
        missed: the questions without one.
    """

    questions: int
    recall: Mapping[int, float]
    mrr: float
    missed: Sequence[str]


def evaluate(
    search: Callable[[str, int], Sequence[Hit]], questions: str | Path | Iterable[Mapping[str, Any]], k: Sequence[int]
) -> Scores:
    """The scores of a search.

    Args:
        search: a question and how many hits, to hits.
        questions: see Retriever.eval.

    Raises:
        DefinitionError: there is no question, or one that is none.
    """
    asked = [_question(q) for q in (_lines(questions) if isinstance(questions, str | Path) else questions)]
    if not asked:
        raise DefinitionError(f"{questions} holds no question", hint="write one JSON object a line")
    ranks = [_rank(search(q["question"], max(k)), q) for q in asked]
    recall = {n: sum(r <= n for r in ranks) / len(ranks) for n in sorted(k)}
    missed = [q["question"] for q, r in zip(asked, ranks, strict=True) if math.isinf(r)]
    return Scores(len(ranks), recall, sum(1 / r for r in ranks) / len(ranks), missed)


def _lines(path: str | Path) -> list[Mapping[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as e:
        raise DefinitionError(f"the questions {str(path)!r} cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise DefinitionError(f"{path} is not one JSON object a line: {e}") from None


def _question(given: Mapping[str, Any]) -> dict[str, Any]:
    sources = given.get("sources", given.get("source"))
    if not isinstance(given.get("question"), str) or sources is None:
        raise DefinitionError(
            "a question to evaluate needs `question` and `source`", hint=f"this one has {', '.join(given)}"
        )
    return {**given, "sources": [sources] if isinstance(sources, str) else list(sources)}


def _rank(hits: Sequence[Hit], question: Mapping[str, Any]) -> float:
    """Of the first right hit, from 1; infinity where there is none."""
    for i, hit in enumerate(hits, 1):
        if hit.source in question["sources"] and question.get("contains", "") in hit.text:
            return i
    return math.inf
