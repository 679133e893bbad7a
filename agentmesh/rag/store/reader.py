"""The half of a store that reads: searches, look-ups, the same behind a filter or at a version."""

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
from agentmesh.rag.store.filters import FilterExpr, intersect, matches, parse
from agentmesh.rag.store.snapshot import Snapshot
from agentmesh.rag.store.state import SourceFacts, State
from agentmesh.rag.store.vector_index import Floats
from agentmesh.rag.store.writer import StoreWriter, scale_vectors

Filter = Mapping[str, Any]
ROW_BYTES = 1500  # a row that no merged file holds yet: its text, its metadata, its places in the tables
TEXT_SEARCH = "agentmesh.rag.store.text_search"  # imported by the first search by words, for it brings tantivy


class StoreReader:
    """Everything that can be asked of a store."""

    path: Path
    _core: StoreWriter
    _filter: FilterExpr | None
    _past: tuple[State, Snapshot] | None

    def bound(self, where: Filter) -> Self:
        """The same store behind a filter that no search can widen; for reading only."""
        return self._like(intersect(self._filter, parse(where)), self._past)

    def at(self, version: int) -> Self:
        """The store as it was at a version: a pinned one, or one of the last hour; for reading only.

        Raises:
            StoreVersion: it is not kept any more; the message names the oldest that is.
        """
        return self._like(self._filter, self._core.past(version))

    def _like(self, where: FilterExpr | None, past: tuple[State, Snapshot] | None) -> Self:
        other = object.__new__(type(self))
        other.path, other._core, other._filter, other._past = self.path, self._core, where, past
        return other

    @property
    def metric(self) -> str:
        """ "cosine" or "l2"."""
        self._core.latest()
        return self._core.metric

    @property
    def identity(self) -> Identity | None:
        """The embedder that the store was filled by; None when it is empty or nobody said."""
        self._core.latest()
        return self._core.identity

    @property
    def version(self) -> int:
        """The number of the newest commit; 0 for a store that has none."""
        return self._view().version

    @property
    def memory_bytes(self) -> int:
        """What this process holds of the store, about: files are mapped and not counted. Reads nothing."""
        state = self._core.state
        if state is None:
            return 0
        return state.delta.n * (4 * state.d + ROW_BYTES) + 2 * sum(segment.n for segment in state.segments)

    def _view(self) -> Snapshot:
        return self._past[1] if self._past else self._core.latest()

    def _both(self, where: Filter | None) -> FilterExpr | None:
        return intersect(self._filter, None if where is None else parse(where))

    def search(self, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k chunks nearest to a vector, best first: as many as pass the filter, if those are fewer.

        Raises:
            FilterInvalid: an unknown operator or field.
            StoreError: k below 1, a vector of another width, NaN or zero.
        """
        return self.search_many(np.asarray(vector, np.float32).reshape(1, -1), k, where=where)[0]

    def search_many(self, vectors: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[list[Hit]]:
        """`search` for several vectors at once."""
        _check_k(k)
        view, test = self._view(), self._both(where)
        queries = self.queries(vectors)
        return view.search(queries, k, self._core.metric, test) if view.version else [[] for _ in queries]

    def search_text(
        self, query: str, k: int, *, where: Filter | None = None, vector: npt.ArrayLike | None = None
    ) -> list[Hit]:  # fmt: skip
        """The k chunks that say most of a question's words, best first; fewer where no more say any.

        Args:
            query: any text; there is no syntax.
            vector: the question's, so that `score` is the cosine, as everywhere; without it `score` is BM25's.

        Raises:
            ExtraMissing: tantivy is not installed.
        """
        _check_k(k)
        view, test = self._view(), self._both(where)
        asked = None if vector is None else self.queries(vector)[0]
        return import_module(TEXT_SEARCH).search_text(view, query, k, test, asked) if view.version else []

    def search_hybrid(
        self, query: str, vector: npt.ArrayLike, k: int, *, where: Filter | None = None
    ) -> list[Hit]:  # fmt: skip
        """The k best by words and by vector together, fused by their ranks; `score` is the cosine.

        Source: Cormack, Clarke, Buettcher, Reciprocal Rank Fusion, SIGIR 2009.
        """
        _check_k(k)
        view, test, asked = self._view(), self._both(where), self.queries(vector)[0]
        texts = import_module(TEXT_SEARCH)
        return texts.search_hybrid(view, query, asked, k, self._core.metric, test) if view.version else []

    def queries(self, vectors: npt.ArrayLike) -> Floats:
        """Vectors of questions, checked and scaled as the stored ones are."""
        found = np.array(vectors, np.float32, ndmin=2)
        d = self._core.about.get("d")
        if d and found.shape[1] != d:
            raise StoreError(
                f"a question's vector has width {found.shape[1]} and {self.path} holds {d}",
                hint="use the store's embedder",
                path=str(self.path),
            )
        return scale_vectors(found, self._core.metric, lambda _: "a question's vector")

    def count(self, where: Filter | None = None) -> int:
        """How many chunks pass."""
        return self._view().count(self._both(where))

    def iterate(self, batch: int = 1000, *, where: Filter | None = None) -> Iterator[list[Chunk]]:
        """All chunks that pass, oldest first, as they were when the iteration began."""
        places = self._view().places(self._both(where))
        while found := [part.rows.chunk(row) for part, row in islice(places, batch)]:
            yield found

    def ids(self, where: Filter | None = None) -> list[str]:
        """The ids of all chunks that pass, oldest first."""
        return [part.rows.id(row) for part, row in self._view().places(self._both(where))]

    def get(self, ids: Sequence[str]) -> list[Chunk | None]:
        """The chunks of ids, in their order; None where there is none, or the bound filter does not pass it."""
        with self._core.lock:
            rows = self._rows(ids)
        return [rows[i][0].chunk(rows[i][1]) if i in rows else None for i in ids]

    def vectors(self, ids: Sequence[str]) -> Floats:
        """float32 (len(ids), d), as they are kept.

        Raises:
            StoreError: one of the ids is not there.
        """
        with self._core.lock:
            rows = self._rows(ids)
        if gone := [i for i in ids if i not in rows]:
            raise StoreError(f"{self.path} has no chunk {gone[0]!r}", path=str(self.path))
        if not ids:
            return np.zeros((0, self._core.about.get("d", 0)), np.float32)
        return np.stack([rows[i][0].vectors[rows[i][1]] for i in ids])

    def _rows(self, ids: Sequence[str]) -> dict[str, tuple[Any, int]]:
        state = self._state()
        if state is None:
            return {}
        found = {i: state.segment(place) for i, place in state.find(ids).items()}
        if self._filter is None:
            return found
        return {i: (s, r) for i, (s, r) in found.items() if matches(self._filter, _fields(s.chunk(r)))}

    def _state(self) -> State | None:
        if self._past:
            return self._past[0]
        self._core.refresh()
        return self._core.state

    def source(self, source: str) -> SourceFacts | None:
        """What is known of one source."""
        return self.sources().get(source) if self._filter is not None else self._one(source)

    def _one(self, source: str) -> SourceFacts | None:
        with self._core.lock:
            state = self._state()
            return state.source(source) if state else None

    def sources(self) -> dict[str, SourceFacts]:
        """What is known of every source that was given with `replace`; of a bound store, of those that it shows."""
        with self._core.lock:
            state = self._state()
            found = state.sources() if state else {}
        if self._filter is None:
            return found
        seen = {chunk.source for chunks in self.iterate() for chunk in chunks}
        return {source: facts for source, facts in found.items() if source in seen}


def _fields(chunk: Chunk) -> dict[str, Any]:
    return {"source": chunk.source, **chunk.metadata}


def _check_k(k: int) -> None:
    if k < 1:
        raise StoreError(f"k is {k}", hint="at least one hit has to be asked for")
