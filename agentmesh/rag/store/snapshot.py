"""What a search reads: the large segments and the memtable at one version. Immutable, shared by threads."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from agentmesh.errors import StoreDamaged
from agentmesh.rag.documents import Hit
from agentmesh.rag.store.columns import Mask, check_fields
from agentmesh.rag.store.filters import FilterExpr
from agentmesh.rag.store.memtable import Memtable
from agentmesh.rag.store.segment import Segment
from agentmesh.rag.store.vector_index import IVF_ROWS, Bits, Floats, Ivf, Rows, flat, packed

# If fewer rows than this pass a filter, they are searched exactly: an index that probes few lists would miss them.
EXACT_ROWS, EXACT_SHARE = 50_000, 0.25

log = logging.getLogger("agentmesh.rag")


@dataclass(frozen=True)
class SnapshotPart:
    """One large segment, or the memtable, at one version."""

    rows: Segment | Memtable
    alive: Mask  # (n,)
    vectors: Floats  # (n, d)

    @property
    def n(self) -> int:
        """The number of rows, alive or not."""
        return len(self.alive)

    @cached_property
    def alive_count(self) -> int:
        """The number of live rows."""
        return int(np.count_nonzero(self.alive))

    @cached_property
    def alive_bits(self) -> Bits | None:
        """The live rows as the bitmap that FAISS reads; None when all rows are alive."""
        return None if self.alive_count == self.n else packed(self.alive)

    def passing(self, where: FilterExpr | None) -> Mask:
        """The live rows that pass a filter."""
        if where is None:
            return self.alive
        mask = self.rows.mask(where, self.n) if isinstance(self.rows, Memtable) else self.rows.mask(where)
        return mask & self.alive

    @cached_property
    def index(self) -> Ivf | None:
        """The vector index of a large segment; None when there is none or it is damaged: then search is exact."""
        if isinstance(self.rows, Memtable) or self.n < IVF_ROWS:
            return None
        path = self.rows.path.with_suffix(".ivf")
        if not path.exists():
            return None
        try:
            return Ivf(path, self.vectors, self.rows.header.get("metric", "cosine"))
        except StoreDamaged as e:
            log.warning("%s; the segment is searched exactly until the next compaction", e)
            return None

    def top(self, queries: Floats, k: int, metric: str, where: FilterExpr | None) -> tuple[Floats, Rows]:
        """The nearest rows that pass, best first.

        Args:
            queries: float32 (q, d).

        Returns:
            Scores float32 (q, n) and rows int64 (q, n), where n = min(k, the number of rows that pass).
        """
        if where is None:
            count, bits = self.alive_count, self.alive_bits
        else:
            passing = self.passing(where)
            count = int(np.count_nonzero(passing))
            bits = packed(passing)
        if not count:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        k = min(k, count)
        index = self.index if count > max(EXACT_ROWS, EXACT_SHARE * self.n) else None
        if index is None:
            return flat(queries, self.vectors, k, metric, bits)
        nearest = [index.top(query, k, bits) for query in queries]
        if any(len(rows) < k for _, rows in nearest):  # the other rows that pass are in lists that were not probed
            return flat(queries, self.vectors, k, metric, bits)
        return np.stack([scores for scores, _ in nearest]), np.stack([rows for _, rows in nearest])


@dataclass(frozen=True)
class Snapshot:
    """A store at one version."""

    version: int
    large_segments: tuple[SnapshotPart, ...]
    memtable: SnapshotPart

    @property
    def parts(self) -> tuple[SnapshotPart, ...]:
        """The large segments and the memtable, in this order, without the empty ones."""
        return tuple(p for p in (*self.large_segments, self.memtable) if p.n)

    @cached_property
    def fields(self) -> set[str]:
        """The field names that a filter may use."""
        return {name for part in self.parts for name in part.rows.fields()}

    def check(self, where: FilterExpr | None) -> None:
        """Refuse a filter on a field that no chunk has.

        Raises:
            FilterInvalid: with the nearest field name.
        """
        if where is not None and any(p.alive_count for p in self.parts):
            check_fields(where, self.fields)

    def count(self, where: FilterExpr | None = None) -> int:
        """The number of rows that pass."""
        self.check(where)
        return sum(p.alive_count if where is None else int(np.count_nonzero(p.passing(where))) for p in self.parts)

    def places(self, where: FilterExpr | None = None) -> Iterator[tuple[SnapshotPart, int]]:
        """Every row that passes, oldest first."""
        self.check(where)
        for part in self.parts:
            for row in np.flatnonzero(part.passing(where)):
                yield part, int(row)

    def search(self, queries: Floats, k: int, metric: str, where: FilterExpr | None = None) -> list[list[Hit]]:
        """The k nearest rows that pass, best first, for each query; never fewer than min(k, how many pass)."""
        self.check(where)
        nearest = [(part, *part.top(queries, k, metric, where)) for part in self.parts]
        results = []
        for q, query in enumerate(queries):
            scores = np.concatenate([s[q] for _, s, _ in nearest]) if nearest else np.empty(0, np.float32)
            places: list[tuple[SnapshotPart, int]] = [(part, int(row)) for part, _, rows in nearest for row in rows[q]]
            best = [int(i) for i in np.argsort(-scores, kind="stable")[:k]]
            if metric == "l2":
                results.append([hit(*places[i], cosine(*places[i], query)) for i in best])
            else:
                hits = [hit(*places[i], float(scores[i])) for i in best]
                results.append(sorted(hits, key=lambda h: (-h.score, h.id)))
        return results


def cosine(part: SnapshotPart, row: int, query: Floats) -> float:
    """The cosine of a row to a query of any length: `Hit.score` where a search ranks by something else."""
    vector = part.vectors[row]
    lengths = float(np.linalg.norm(vector)) * float(np.linalg.norm(query))
    return float(vector @ query) / lengths if lengths else 0.0


def hit(part: SnapshotPart, row: int, score: float) -> Hit:
    """A row as a search result."""
    c = part.rows.chunk(row)
    return Hit(c.id, c.text, c.source, c.start, float(score), c.heading, c.metadata)
