"""The reading half of FaissStore: search and lookup, also through a bound filter or at an older version."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from agentmesh.errors import StoreError
from agentmesh.rag.documents import Chunk, Hit
from agentmesh.rag.embedders.base import Identity
from agentmesh.rag.store.filters import FilterExpr, intersect, matches, parse_filter
from agentmesh.rag.store.snapshot import Snapshot
from agentmesh.rag.store.state import SourceFacts, State
from agentmesh.rag.store.vector_index import Floats
from agentmesh.rag.store.writer import StoreWriter, scale_vectors

Filter = Mapping[str, Any]
ROW_BYTES = 1500  # a row that no merged file holds yet: its text, its metadata, its places in the tables
TEXT_SEARCH = "agentmesh.rag.store.text_search"  # imports tantivy, so it is imported by the first full-text search


class StoreReader:
    """What a store can be asked."""

    path: Path
    _writer: StoreWriter
    _filter: FilterExpr | None
    _past: tuple[State, Snapshot] | None

    def bound(self, where: Filter) -> Self:
        """The same store through a filter that no search can widen; read-only."""
        return self._copy(intersect(self._filter, parse_filter(where)), self._past)

    def at(self, version: int) -> Self:
        """The store at an older version: a pinned one, or one of the last hour; read-only.

        Raises:
            StoreVersion: its files were removed; the hint names the oldest version.
        """
        return self._copy(self._filter, self._writer.at_version(version))

    def _copy(self, where: FilterExpr | None, past: tuple[State, Snapshot] | None) -> Self:
        copy = object.__new__(type(self))
        copy.path, copy._writer, copy._filter, copy._past = self.path, self._writer, where, past
        return copy

    @property
    def metric(self) -> str:
        """ "cosine" or "l2"."""
        self._writer.latest()
        return self._writer.metric

    @property
    def identity(self) -> Identity | None:
        """The embedder of the store's vectors; None for an empty store, or when its writer named none."""
        self._writer.latest()
        return self._writer.identity

    @property
    def version(self) -> int:
        """The number of the newest commit; 0 for a store that has none."""
        return self._snapshot().version

    @property
    def memory_bytes(self) -> int:
        """What this process holds of the store, about: files are mapped and not counted. Reads nothing."""
        state = self._writer.state
        if state is None:
            return 0
        return state.memtable.n * (4 * state.d + ROW_BYTES) + 2 * sum(segment.n for segment in state.segments)

    def _snapshot(self) -> Snapshot:
        return self._past[1] if self._past else self._writer.latest()

    def _with_bound(self, where: Filter | None) -> FilterExpr | None:
        return intersect(self._filter, None if where is None else parse_filter(where))

    def search(self, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k chunks nearest to a vector, best first; fewer than k only when fewer pass the filter.

        Args:
            vector: float32 (d,), of any length.
            where: a filter in MongoDB's syntax over metadata and `source`.

        Raises:
            FilterInvalid: an unknown operator or field.
            StoreError: k below 1, a vector of another width, NaN or zero.
        """
        return self.search_many(np.asarray(vector, np.float32).reshape(1, -1), k, where=where)[0]

    def search_many(self, vectors: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[list[Hit]]:
        """`search` for several vectors, float32 (q, d), at once."""
        _check_k(k)
        snapshot, condition = self._snapshot(), self._with_bound(where)
        queries = self.queries(vectors)
        if not snapshot.version:
            return [[] for _ in queries]
        return snapshot.search(queries, k, self._writer.metric, condition)

    def search_text(
        self, query: str, k: int, *, where: Filter | None = None, vector: npt.ArrayLike | None = None
    ) -> list[Hit]:  # fmt: skip
        """The k chunks that match a query's words best, by BM25, best first; fewer when fewer have one of its words.

        Args:
            query: any text; there is no syntax.
            vector: the query's, so that `score` is the cosine as in every search; without it `score` is BM25's.

        Raises:
            ExtraMissing: tantivy is not installed.
        """
        _check_k(k)
        snapshot, condition = self._snapshot(), self._with_bound(where)
        query_vector = None if vector is None else self.queries(vector)[0]
        if not snapshot.version:
            return []
        hits: list[Hit] = import_module(TEXT_SEARCH).search_text(snapshot, query, k, condition, query_vector)
        return hits

    def search_hybrid(
        self, query: str, vector: npt.ArrayLike, k: int, *, where: Filter | None = None
    ) -> list[Hit]:  # fmt: skip
        """The k best by words and by vector, the two rankings fused; `score` is the cosine.

        Source: Cormack, Clarke, Buettcher, Reciprocal Rank Fusion, SIGIR 2009.
        """
        _check_k(k)
        snapshot, condition, query_vector = self._snapshot(), self._with_bound(where), self.queries(vector)[0]
        text_search = import_module(TEXT_SEARCH)
        if not snapshot.version:
            return []
        hits: list[Hit] = text_search.search_hybrid(snapshot, query, query_vector, k, self._writer.metric, condition)
        return hits

    def queries(self, vectors: npt.ArrayLike) -> Floats:
        """Query vectors, float32 (q, d), checked and scaled as the stored ones are.

        Raises:
            StoreError: another width than the store's, NaN, infinity, or zero under "cosine".
        """
        queries = np.array(vectors, np.float32, ndmin=2)
        d = self._writer.settings.get("d")
        if d and queries.shape[1] != d:
            raise StoreError(
                f"the vector of the query has width {queries.shape[1]} and {self.path} holds vectors of width {d}",
                hint="use the store's embedder",
                path=str(self.path),
            )
        return scale_vectors(queries, self._writer.metric, lambda _: "the vector of the query")

    def count(self, where: Filter | None = None) -> int:
        """The number of chunks that pass."""
        return self._snapshot().count(self._with_bound(where))

    def iterate(self, batch: int = 1000, *, where: Filter | None = None) -> Iterator[list[Chunk]]:
        """All chunks that pass, oldest first, in batches; they are those of the version when the iteration began."""
        places = self._snapshot().places(self._with_bound(where))
        while chunks := [part.rows.chunk(row) for part, row in islice(places, batch)]:
            yield chunks

    def ids(self, where: Filter | None = None) -> list[str]:
        """The ids of all chunks that pass, oldest first."""
        return [part.rows.id(row) for part, row in self._snapshot().places(self._with_bound(where))]

    def get(self, ids: Sequence[str]) -> list[Chunk | None]:
        """The chunks with these ids, in their order; None for an id that is unknown or hidden by the bound filter."""
        with self._writer.lock:
            rows = self._rows(ids)
        return [rows[i][0].chunk(rows[i][1]) if i in rows else None for i in ids]

    def vectors(self, ids: Sequence[str]) -> Floats:
        """The vectors of chunks as they are stored, float32 (len(ids), d).

        Raises:
            StoreError: there is no chunk with one of the ids.
        """
        with self._writer.lock:
            rows = self._rows(ids)
        if unknown := [i for i in ids if i not in rows]:
            raise StoreError(f"{self.path} has no chunk {unknown[0]!r}", path=str(self.path))
        if not ids:
            return np.zeros((0, self._writer.settings.get("d", 0)), np.float32)
        return np.stack([rows[i][0].vectors[rows[i][1]] for i in ids])

    def _rows(self, ids: Sequence[str]) -> dict[str, tuple[Any, int]]:
        state = self._state()
        if state is None:
            return {}
        rows = {i: state.segment(place) for i, place in state.find(ids).items()}
        if self._filter is None:
            return rows
        return {i: (s, r) for i, (s, r) in rows.items() if matches(self._filter, _fields(s.chunk(r)))}

    def _state(self) -> State | None:
        if self._past:
            return self._past[0]
        self._writer.refresh()
        return self._writer.state

    def source(self, source: str) -> SourceFacts | None:
        """The facts of one source; None when there is none of this name."""
        if self._filter is not None:
            return self.sources().get(source)
        with self._writer.lock:
            state = self._state()
            return state.source(source) if state else None

    def sources(self) -> dict[str, SourceFacts]:
        """The facts of every source written by `replace`; of a bound store, of those with a chunk that passes."""
        with self._writer.lock:
            state = self._state()
            facts_of = state.sources() if state else {}
        if self._filter is None:
            return facts_of
        passing = {chunk.source for chunks in self.iterate() for chunk in chunks}
        return {source: facts for source, facts in facts_of.items() if source in passing}


def _fields(chunk: Chunk) -> dict[str, Any]:
    return {"source": chunk.source, **chunk.metadata}


def _check_k(k: int) -> None:
    if k < 1:
        raise StoreError(f"k is {k}", hint="set it to 1 or more")
