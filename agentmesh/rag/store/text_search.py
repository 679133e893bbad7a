"""Search by words, and by words and vectors together, in a store's view. Each process keeps one text index a segment."""

import logging
import os
import threading
import weakref
from collections.abc import Mapping

import numpy as np

from agentmesh.rag.documents import Hit
from agentmesh.rag.ranking import rrf
from agentmesh.rag.store.columns import Mask
from agentmesh.rag.store.filters import FilterExpr
from agentmesh.rag.store.memtable import Memtable
from agentmesh.rag.store.segment import Segment
from agentmesh.rag.store.snapshot import Snapshot, SnapshotPart, hit
from agentmesh.rag.store.text_index import TextIndex, terms, weigh
from agentmesh.rag.store.vector_index import Floats

OVERSAMPLE = 2  # times as many hits are asked for as a filter should leave
DEPTH = 30  # of each ranking that is fused, at least

Ranked = tuple[float, str, SnapshotPart, int]  # score, id, part, row

log = logging.getLogger("agentmesh.rag")


class _Held:
    """The index of one segment or delta, filled by whichever search needs it first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.index: TextIndex | None = None


_held: "weakref.WeakKeyDictionary[Segment | Memtable, _Held]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _after_fork() -> None:
    """A child makes its own: the parent's locks may be held by threads that are not there."""
    global _held, _lock
    _held, _lock = weakref.WeakKeyDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def index_of(part: SnapshotPart) -> TextIndex:
    """The text index of a part's rows: from the folder beside the segment, else made here from the texts."""
    rows = part.rows
    with _lock:
        held = _held.setdefault(rows, _Held())
    with held.lock:
        if held.index is None:
            held.index = _opened(rows) if isinstance(rows, Segment) else TextIndex()
        index = held.index
        index.extend([(row, rows.text(row)) for row in range(index.n, part.n)])
    return index


def _opened(segment: Segment) -> TextIndex:
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


def search_text(view: Snapshot, query: str, k: int, where: FilterExpr | None, asked: Floats | None = None) -> list[Hit]:
    """The k chunks that say most of a query's words, best first; `score` is the cosine to `asked`, else BM25's."""
    view.check(where)
    found = ranked(view, query, k, where)
    return [hit(part, row, score if asked is None else _cosine(part, row, asked)) for score, _, part, row in found]


def search_hybrid(
    view: Snapshot, query: str, asked: Floats, k: int, metric: str, where: FilterExpr | None
) -> list[Hit]:  # fmt: skip
    """The k best of both rankings fused; `score` is the cosine.

    Args:
        asked: float32 (d,), checked and scaled as `FaissStore.queries` does it.
    """
    view.check(where)
    depth = max(2 * k, DEPTH)
    # under a filter each of these costs as many hits as the filter throws away
    worded = depth if where is None else max(k, DEPTH // 2)
    rankings = [_nearest(view, asked, depth, metric, where), ranked(view, query, worded, where)]
    places = {id: (part, row) for ranking in rankings for _, id, part, row in ranking}
    best = rrf([[id for _, id, _, _ in ranking] for ranking in rankings])[:k]
    return [hit(*places[id], _cosine(*places[id], asked)) for id, _ in best]


def ranked(view: Snapshot, query: str, k: int, where: FilterExpr | None) -> list[Ranked]:
    """The k best by BM25, best first, equal ones by id; fewer only where fewer rows have a word of the query."""
    wanted = terms(query)
    if not wanted or k < 1:
        return []
    indexes = [(part, index_of(part)) for part in view.parts]
    weights = weigh(wanted, (index for _, index in indexes))
    found = [(s, part, row) for part, index in indexes for row, s in _top(part, index, weights, k, where)]
    found.sort(key=lambda f: -f[0])
    # equal scores may lie on both sides of the k-th: the ids decide, and so the same question has the same answer
    last = found[k - 1][0] if len(found) >= k else float("-inf")
    named = [(score, part.rows.id(row), part, row) for score, part, row in found if score >= last]
    return sorted(named, key=lambda f: (-f[0], f[1]))[:k]


def _top(
    part: SnapshotPart, index: TextIndex, weights: Mapping[str, float], k: int, where: FilterExpr | None
) -> list[tuple[int, float]]:  # fmt: skip
    passing = part.passing(where)
    count = part.seen if where is None else int(np.count_nonzero(passing))
    if not count:
        return []
    limit = k if count == index.n else k + OVERSAMPLE * k * index.n // count
    if limit > 1500 + 2 * count:  # naming the rows in the query is cheaper: measured, 1.3 us a hit and 2.5 us a row
        return index.search(weights, k, among=np.flatnonzero(passing).tolist())
    found = _visible(index.search(weights, limit), passing)
    if len(found[0]) < k and found[1] == limit:  # the filter dislikes what the query likes
        return index.search(weights, k, among=np.flatnonzero(passing).tolist())
    return found[0][:k]


def _visible(found: list[tuple[int, float]], passing: Mask) -> tuple[list[tuple[int, float]], int]:
    """Those that pass, and how many there were; a newer search may have added rows behind this view's."""
    return [(row, score) for row, score in found if row < len(passing) and passing[row]], len(found)


def _nearest(view: Snapshot, asked: Floats, k: int, metric: str, where: FilterExpr | None) -> list[Ranked]:
    found = []
    for part in view.parts:
        scores, rows = part.top(asked[None], k, metric, where)
        found += [(float(s), part, int(r)) for s, r in zip(scores[0], rows[0], strict=True)]
    found.sort(key=lambda f: -f[0])
    return sorted(((s, part.rows.id(row), part, row) for s, part, row in found[:k]), key=lambda f: (-f[0], f[1]))


def _cosine(part: SnapshotPart, row: int, asked: Floats) -> float:
    vector = part.vectors[row]
    lengths = float(np.linalg.norm(vector)) * float(np.linalg.norm(asked))
    return float(vector @ asked) / lengths if lengths else 0.0
