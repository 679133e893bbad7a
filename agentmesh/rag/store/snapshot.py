"""What one search looks at: large segments and the delta as they were at one version. Never changed, shared by threads."""

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

EXACT_ROWS, EXACT_SHARE = 50_000, 0.25  # if fewer pass, they are searched exactly: under a filter an index misses them

log = logging.getLogger("agentmesh.rag")


@dataclass(frozen=True)
class SnapshotPart:
    """Rows under one numbering: a large segment, or the delta."""

    rows: Segment | Memtable
    alive: Mask  # (n,)
    vectors: Floats  # (n, d)

    @property
    def n(self) -> int:
        """All rows, seen or not."""
        return len(self.alive)

    @cached_property
    def seen(self) -> int:
        """How many rows are to be seen."""
        return int(np.count_nonzero(self.alive))

    @cached_property
    def alive_bits(self) -> Bits | None:
        """The rows to be seen as FAISS reads them; None for all."""
        return None if self.seen == self.n else packed(self.alive)

    def passing(self, where: FilterExpr | None) -> Mask:
        """The rows that are to be seen and pass a filter."""
        if where is None:
            return self.alive
        mask = self.rows.mask(where, self.n) if isinstance(self.rows, Memtable) else self.rows.mask(where)
        return mask & self.alive

    @cached_property
    def index(self) -> Ivf | None:
        """The index beside a large segment; without one, or with a damaged one, the segment is searched exactly."""
        if isinstance(self.rows, Memtable) or self.n < IVF_ROWS:
            return None
        path = self.rows.path.with_suffix(".ivf")
        if not path.exists():
            return None
        try:
            return Ivf(path, self.vectors, self.rows.header.get("metric", "cosine"))
        except StoreDamaged as e:
            log.warning("%s; searched exactly until the next compaction", e)
            return None

    def top(self, queries: Floats, k: int, metric: str, where: FilterExpr | None) -> tuple[Floats, Rows]:
        """The nearest rows that pass: min(k, how many pass) of them, best first."""
        if where is None:
            count, bits = self.seen, self.alive_bits
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
        found = [index.top(query, k, bits) for query in queries]
        if any(
            len(rows) < k for _, rows in found
        ):  # too few in the lists looked into: the rows that pass are elsewhere
            return flat(queries, self.vectors, k, metric, bits)
        return np.stack([scores for scores, _ in found]), np.stack([rows for _, rows in found])


@dataclass(frozen=True)
class Snapshot:
    """A store at one version."""

    version: int
    blocks: tuple[SnapshotPart, ...]
    delta: SnapshotPart

    @property
    def parts(self) -> tuple[SnapshotPart, ...]:
        """All parts that have rows; the delta is the last."""
        return tuple(p for p in (*self.blocks, self.delta) if p.n)

    @cached_property
    def fields(self) -> set[str]:
        """The names a filter may use."""
        found: set[str] = set()
        for part in self.parts:
            found |= part.rows.fields()
        return found

    def check(self, where: FilterExpr | None) -> None:
        """Refuses a filter on a field that nothing here has.

        Raises:
            FilterInvalid
        """
        if where is not None and any(p.seen for p in self.parts):
            check_fields(where, self.fields)

    def count(self, where: FilterExpr | None = None) -> int:
        """How many rows pass."""
        self.check(where)
        return sum(p.seen if where is None else int(np.count_nonzero(p.passing(where))) for p in self.parts)

    def places(self, where: FilterExpr | None = None) -> Iterator[tuple[SnapshotPart, int]]:
        """Every row that passes, oldest first."""
        self.check(where)
        for part in self.parts:
            for row in np.flatnonzero(part.passing(where)):
                yield part, int(row)

    def search(self, queries: Floats, k: int, metric: str, where: FilterExpr | None = None) -> list[list[Hit]]:
        """The k nearest that pass, best first, for each query; never fewer than min(k, how many pass)."""
        self.check(where)
        found = [(part, *part.top(queries, k, metric, where)) for part in self.parts]
        out = []
        for q in range(len(queries)):
            scores = np.concatenate([s[q] for _, s, _ in found]) if found else np.empty(0, np.float32)
            places = [(part, int(row)) for part, _, rows in found for row in rows[q]]
            best = np.argsort(-scores, kind="stable")[:k]
            hits = [_hit(places[i], queries[q], float(scores[i]), metric) for i in best]
            out.append(hits if metric == "l2" else sorted(hits, key=lambda h: (-h.score, h.id)))
        return out


def _hit(place: tuple[SnapshotPart, int], query: Floats, score: float, metric: str) -> Hit:
    part, row = place
    return hit(part, row, cosine(part, row, query, score, metric))


def cosine(part: SnapshotPart, row: int, query: Floats, score: float, metric: str) -> float:
    """What `Hit.score` says in every kind of search."""
    if metric == "cosine":
        return score
    vector = part.vectors[row]
    lengths = float(np.linalg.norm(vector) * np.linalg.norm(query))
    return float(vector @ query) / lengths if lengths else 0.0


def hit(part: SnapshotPart, row: int, score: float) -> Hit:
    """A row as it is answered."""
    c = part.rows.chunk(row)
    return Hit(c.id, c.text, c.source, c.start, float(score), c.heading, c.metadata)
