"""Evaluation of a search: recall and mean reciprocal rank over questions with known sources."""

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
    """The scores of a search over some questions.

    Args:
        questions: their number.
        recall: by k, the share of questions with a relevant passage among the first k hits.
        mrr: mean reciprocal rank: the mean of 1 / rank of the first relevant hit, 0 where there is none in `max(k)`.
        missed: the questions without a relevant hit.
    """

    questions: int
    recall: Mapping[int, float]
    mrr: float
    missed: Sequence[str]


def evaluate(
    search: Callable[[str, int], Sequence[Hit]], questions: str | Path | Iterable[Mapping[str, Any]], k: Sequence[int]
) -> Scores:
    """Score a search.

    Args:
        search: takes a question and a number of hits, and returns the hits.
        questions: as for `Retriever.evaluate`.
        k: the ranks at which recall is counted.

    Raises:
        DefinitionError: there is no question, or one of them is incomplete.
    """
    parsed = [_question(q) for q in (_read_lines(questions) if isinstance(questions, str | Path) else questions)]
    if not parsed:
        raise DefinitionError(f"{questions} contains no question", hint="write one JSON object on each line")
    ranks = [_rank(search(q["question"], max(k)), q) for q in parsed]
    recall = {n: sum(r <= n for r in ranks) / len(ranks) for n in sorted(k)}
    missed = [q["question"] for q, r in zip(parsed, ranks, strict=True) if math.isinf(r)]
    return Scores(len(ranks), recall, sum(1 / r for r in ranks) / len(ranks), missed)


def _read_lines(path: str | Path) -> list[Mapping[str, Any]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except OSError as e:
        raise DefinitionError(f"the questions {str(path)!r} cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise DefinitionError(
            f"a line of {path} is not JSON ({e})", hint="write one JSON object on each line"
        ) from None


def _question(data: Mapping[str, Any]) -> dict[str, Any]:
    sources = data.get("sources", data.get("source"))
    if not isinstance(data.get("question"), str) or sources is None:
        fields = ", ".join(data) or "nothing"
        raise DefinitionError(f"a question to evaluate has {fields}", hint="give it `question` and `source`")
    return {**data, "sources": [sources] if isinstance(sources, str) else list(sources)}


def _rank(hits: Sequence[Hit], question: Mapping[str, Any]) -> float:
    """The rank of the first relevant hit, from 1; infinity where there is none."""
    for i, hit in enumerate(hits, 1):
        if hit.source in question["sources"] and question.get("contains", "") in hit.text:
            return i
    return math.inf
