"""Full-text and hybrid search in a snapshot of a store. Each process holds one text index for each segment."""

import logging
import os
import threading
import weakref
from collections.abc import Mapping

import numpy as np

from agentmesh.rag.documents import Hit
from agentmesh.rag.ranking import rrf
from agentmesh.rag.store.filters import FilterExpr
from agentmesh.rag.store.memtable import Memtable
from agentmesh.rag.store.segment import Segment
from agentmesh.rag.store.snapshot import Snapshot, SnapshotPart, cosine, hit
from agentmesh.rag.store.text_index import RowScores, TextIndex, terms, weigh
from agentmesh.rag.store.vector_index import Floats

OVERSAMPLING = 2  # under a filter, k / (share that passes) hits should leave k; this times as many are fetched
MIN_DEPTH = 30  # hits of each ranking that is fused, at least

Ranked = tuple[float, str, SnapshotPart, int]  # score, chunk id, part, row

log = logging.getLogger("agentmesh.rag")


class _IndexSlot:
    """The text index of one segment or memtable, filled by the first search that needs it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.index: TextIndex | None = None


_slots: "weakref.WeakKeyDictionary[Segment | Memtable, _IndexSlot]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # for `_slots`


def _after_fork() -> None:
    """Start empty in a child: the parent's locks may be held by threads that do not exist here."""
    global _slots, _lock
    _slots, _lock = weakref.WeakKeyDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def index_of(part: SnapshotPart) -> TextIndex:
    """The text index of a part: opened beside its segment, or built in memory from the texts."""
    rows = part.rows
    with _lock:
        slot = _slots.setdefault(rows, _IndexSlot())
    with slot.lock:
        if slot.index is None:
            slot.index = _open_index(rows) if isinstance(rows, Segment) else TextIndex()
        index = slot.index
        index.extend([(row, rows.text(row)) for row in range(index.n, part.n)])
    return index


def _open_index(segment: Segment) -> TextIndex:
    folder = segment.path.with_suffix(".text")
    if folder.is_dir():
        try:
            index = TextIndex.open(folder)
            if index.n == segment.n:
                return index
            problem = f"it has {index.n} rows of {segment.n}"
        except (OSError, ValueError) as e:
            problem = str(e)
        log.warning("%s cannot be used (%s); its texts are indexed in memory", folder, problem)
    return TextIndex()


def search_text(
    snapshot: Snapshot, query: str, k: int, where: FilterExpr | None, vector: Floats | None = None
) -> list[Hit]:
    """The k chunks that match a query's words best, best first; `score` is the cosine to `vector`, or BM25's without it."""
    snapshot.check(where)
    best = rank_by_words(snapshot, query, k, where)
    return [hit(part, row, score if vector is None else cosine(part, row, vector)) for score, _, part, row in best]


def search_hybrid(
    snapshot: Snapshot, query: str, vector: Floats, k: int, metric: str, where: FilterExpr | None
) -> list[Hit]:  # fmt: skip
    """The k best of the full-text and the vector ranking, fused; `score` is the cosine.

    Args:
        vector: float32 (d,), the query's, as `FaissStore.queries` checks and scales it.
    """
    snapshot.check(where)
    depth = max(2 * k, MIN_DEPTH)
    # under a filter a deeper full-text ranking costs as many hits more as the filter drops
    text_depth = depth if where is None else max(k, MIN_DEPTH // 2)
    rankings = [
        rank_by_vector(snapshot, vector, depth, metric, where), rank_by_words(snapshot, query, text_depth, where)
    ]  # fmt: skip
    places = {id: (part, row) for ranking in rankings for _, id, part, row in ranking}
    best = rrf([[id for _, id, _, _ in ranking] for ranking in rankings])[:k]
    return [hit(*places[id], cosine(*places[id], vector)) for id, _ in best]


def rank_by_words(snapshot: Snapshot, query: str, k: int, where: FilterExpr | None) -> list[Ranked]:
    """The k best rows by BM25, best first, equal scores by id; fewer only where fewer rows have a term of the query."""
    query_terms = terms(query)
    if not query_terms or k < 1:
        return []
    indexes = [(part, index_of(part)) for part in snapshot.parts]
    weights = weigh(query_terms, (index for _, index in indexes))
    rows = [(s, part, row) for part, index in indexes for row, s in _top(part, index, weights, k, where)]
    rows.sort(key=lambda r: -r[0])
    # rows after the k-th may have the same score: ids break ties, so that the same query has the same result
    lowest = rows[k - 1][0] if len(rows) >= k else float("-inf")
    ranking = [(score, part.rows.id(row), part, row) for score, part, row in rows if score >= lowest]
    return sorted(ranking, key=lambda r: (-r[0], r[1]))[:k]


def rank_by_vector(
    snapshot: Snapshot, vector: Floats, k: int, metric: str, where: FilterExpr | None
) -> list[Ranked]:  # fmt: skip
    """The k nearest rows to a vector, best first, equal scores by id."""
    nearest = []
    for part in snapshot.parts:
        scores, rows = part.top(vector[None], k, metric, where)
        nearest += [(float(s), part, int(r)) for s, r in zip(scores[0], rows[0], strict=True)]
    nearest.sort(key=lambda n: -n[0])
    return sorted(((s, part.rows.id(row), part, row) for s, part, row in nearest[:k]), key=lambda r: (-r[0], r[1]))


def _top(
    part: SnapshotPart, index: TextIndex, weights: Mapping[str, float], k: int, where: FilterExpr | None
) -> RowScores:  # fmt: skip
    passing = part.passing(where)
    count = part.alive_count if where is None else int(np.count_nonzero(passing))
    if not count:
        return []
    limit = k if count == index.n else k + OVERSAMPLING * k * index.n // count
    if limit > 1500 + 2 * count:  # naming the rows in the query is faster: measured, 1.3 us a hit and 2.5 us a row
        return index.search(weights, k, among=np.flatnonzero(passing).tolist())
    hits = index.search(weights, limit)
    # a search of a newer snapshot may have added rows that this one does not have
    best = [(row, score) for row, score in hits if row < len(passing) and passing[row]]
    if len(best) < k and len(hits) == limit:  # the filter drops most of what matches the query
        return index.search(weights, k, among=np.flatnonzero(passing).tolist())
    return best[:k]
