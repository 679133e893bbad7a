"""Ranking: reciprocal rank fusion of several rankings, and maximal marginal relevance."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from agentmesh.rag.embedders.base import Floats

RRF_K = 60  # the constant of the paper


def rrf(rankings: Iterable[Sequence[str]], *, k: int = RRF_K) -> list[tuple[str, float]]:
    """Fuse rankings of ids by reciprocal rank: ids with their scores, best first, equal scores in the order of ids.

    >>> [id for id, _ in rrf([["a", "b"], ["b", "c"]])]
    ['b', 'a', 'c']

    Source: Cormack, Clarke, Buettcher, Reciprocal Rank Fusion, SIGIR 2009.
    """
    scores: dict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, id in enumerate(ranking, 1):
            scores[id] += 1 / (k + rank)
    return sorted(scores.items(), key=lambda s: (-s[1], s[0]))


def mmr(query: Floats, vectors: Floats, k: int, *, relevance: float = 0.5) -> list[int]:
    """At most k rows of `vectors` that are near the query and far from one another, in the order of choice.

    Args:
        query: float32 (d,), of unit length.
        vectors: float32 (n, d), rows of unit length.
        relevance: the weight of the similarity to the query, 0 to 1; the rest is the weight of the differences.

    Source: Carbonell and Goldstein, The Use of MMR, SIGIR 1998, equation 1.
    """
    if not len(vectors) or k < 1:
        return []
    to_query = vectors @ query  # (n, d) x (d,) -> (n,)
    to_chosen = np.full(len(vectors), -np.inf, np.float32)  # similarity to the nearest chosen row, (n,)
    score, chosen = to_query.copy(), []
    for _ in range(min(k, len(vectors))):
        best = int(np.argmax(score))
        chosen.append(best)
        to_chosen = np.maximum(to_chosen, vectors @ vectors[best])
        score = relevance * to_query - (1 - relevance) * to_chosen
        score[chosen] = -np.inf
    return chosen
