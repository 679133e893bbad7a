"""Many rankings into one, and near passages thinned out."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from agentmesh.rag.embedders.base import Floats

K = 60


def rrf(rankings: Iterable[Sequence[str]], *, k: int = K) -> list[tuple[str, float]]:
    """Ids and their fused scores, the best first; equal ones in the order of their ids.

    >>> [i for i, _ in rrf([["a", "b"], ["b", "c"]])]
    ['b', 'a', 'c']

    Source: Cormack, Clarke, Buettcher, Reciprocal Rank Fusion, SIGIR 2009.
    """
    scores: dict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, id in enumerate(ranking, 1):
            scores[id] += 1 / (k + rank)
    return sorted(scores.items(), key=lambda s: (-s[1], s[0]))


def mmr(query: Floats, vectors: Floats, k: int, *, relevance: float = 0.5) -> list[int]:
    """Rows of `vectors` that are near the query and far from one another, in the order they were chosen.

    Args:
        query: float32 (d,), of unit length.
        vectors: float32 (n, d), rows of unit length.
        relevance: 1 looks at the query alone, 0 at the differences alone.

    Source: Carbonell and Goldstein, The Use of MMR, SIGIR 1998, equation 1.
    """
    if not len(vectors) or k < 1:
        return []
    near = vectors @ query  # (n, d) x (d,) -> (n,)
    alike = np.full(len(vectors), -np.inf, np.float32)  # to the nearest that is chosen
    score, chosen = near.copy(), []
    for _ in range(min(k, len(vectors))):
        best = int(np.argmax(score))
        chosen.append(best)
        alike = np.maximum(alike, vectors @ vectors[best])
        score = relevance * near - (1 - relevance) * alike
        score[chosen] = -np.inf
    return chosen
