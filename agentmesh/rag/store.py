"""The FAISS store: a folder that many processes read and write at once, and that no crash can harm."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from agentmesh.errors import StoreConflict, StoreError
from agentmesh.rag.chunk import Chunk, Hit, Value
from agentmesh.rag.core import Core
from agentmesh.rag.embed import Identity
from agentmesh.rag.index import Floats
from agentmesh.rag.packing import Draft, Replacement, checked, scaled
from agentmesh.rag.state import Commit, SourceFacts, State
from agentmesh.rag.upkeep import Stats, pin, stats, unpin, verify
from agentmesh.rag.view import View
from agentmesh.rag.where import Where, both, matches, parse

Filter = Mapping[str, Any]
TEXTS = "agentmesh.rag.texts"  # imported by the first search by words, for it brings tantivy


class FaissStore:
    """Chunks with their vectors, in a folder.

    Opening does no I/O; the first search or commit reads the folder, each process for itself. Every method may be
    called from any thread. A commit is on the disk and visible everywhere when its method returns, or not at all.
    """

    def __init__(self, path: str | Path, *, metric: str | None = None, identity: Identity | None = None) -> None:
        """A store in a folder, which is made by the first commit.

        Args:
            metric: "cosine" or "l2"; None takes the folder's own, "cosine" for a new one.
            identity: the embedder that the vectors come from; a store filled by another one refuses it.
        """
        self.path = Path(path)
        self._core = Core(self.path, metric, identity)
        self._core.build_text = _build_text if find_spec("tantivy") else None
        self._filter: Where | None = None
        self._past: tuple[State, View] | None = None

    def bound(self, where: Filter) -> Self:
        """The same store behind a filter that no search can widen; for reading only."""
        return self._like(both(self._filter, parse(where)), self._past)

    def at(self, version: int) -> Self:
        """The store as it was at a version: a pinned one, or one of the last hour; for reading only.

        Raises:
            StoreVersion: it is not kept any more; the message names the oldest that is.
        """
        return self._like(self._filter, self._core.past(version))

    def _like(self, where: Where | None, past: tuple[State, View] | None) -> Self:
        other = object.__new__(type(self))
        other.path, other._core, other._filter, other._past = self.path, self._core, where, past
        return other

    # what is written

    def replace(
        self, source: str, chunks: Sequence[Chunk], vectors: npt.ArrayLike, *, digest: str,
        expects: str | None = None, key: str = "", part: tuple[int, int] = (1, 1), facts: Mapping[str, Any] | None = None,
    ) -> Commit:  # fmt: skip
        """New chunks of a source for its old ones, in one commit.

        Args:
            digest: of the content the chunks come from.
            expects: the digest that the source had when its writer looked, "" for none; None does not ask.
            key: of the step that writes; the same key again answers the first commit and changes nothing.
            part: (i, n), from 1, of a source that is too large for one commit; it is hidden before all n are there.
            facts: JSON that `sources()` gives back.

        Raises:
            StoreConflict: the source has another digest than expected.
            StoreError: something in the chunks or vectors cannot be kept.
        """
        item = Replacement(source, chunks, vectors, digest, expects, part, facts or {})
        done = self.replace_many([item], key=key)
        if done.refused:
            found = self.source(source)
            had = found.digest if found else ""
            raise StoreConflict(
                f"{source!r} has changed since it was read: expected {expects!r}, found {had!r}; read it again",
                path=str(self.path), source=source, expected=expects, found=had,
            )  # fmt: skip
        return done

    def replace_many(self, items: Sequence[Replacement], *, key: str = "") -> Commit:
        """Several sources in one commit. A source that is not as expected is left as it is and named in `refused`."""
        names = [item.source for item in items]
        if twice := {name for name in names if names.count(name) > 1}:
            raise StoreError(f"the source {min(twice)!r} is twice in one commit; give all its chunks together")
        for item in items:
            if not 1 <= item.part[0] <= item.part[1]:
                raise StoreError(f"part {item.part} of {item.source!r}: (i, n) with 1 <= i <= n is needed")
        self._own()
        metric = self._core.metric
        vectors = [checked(item.chunks, item.vectors, metric, item.source) for item in items]

        def build(state: State) -> Draft | Commit:
            draft = Draft()
            for item, rows in zip(items, vectors, strict=True):
                if item.expects is None or item.expects == _digest(state, item.source):
                    draft.replace(item, rows)
                else:
                    draft.refused.append(item.source)
            if items and len(draft.refused) == len(items):
                return Commit(state.version, 0, 0, refused=tuple(draft.refused))
            return draft

        return self._core.commit(build, d=_width(vectors), key=key)

    def remove(self, sources: Sequence[str], *, expects: Mapping[str, str] | None = None, key: str = "") -> Commit:
        """Sources out, with all their chunks. One that is not as `expects` says stays and is named in `refused`."""

        def build(state: State) -> Draft | Commit:
            draft = Draft()
            for source in sources:
                had = _digest(state, source)
                if expects is not None and source in expects and expects[source] != had:
                    draft.refused.append(source)
                elif state.source(source) or source in state.pending or any(map(state.alive, state.rows_of(source))):
                    draft.sources[source] = None
            return draft if draft.sources else Commit(state.version, 0, 0, refused=tuple(draft.refused))

        self._own()
        return self._core.commit(build, d=0, key=key)

    def upsert(self, chunks: Sequence[Chunk], vectors: npt.ArrayLike, *, key: str = "") -> Commit:
        """Chunks in; one with an id that is there takes its place. What is known of their sources stays."""
        self._own()
        rows = checked(chunks, vectors, self._core.metric)
        draft = Draft()
        draft.add(chunks, rows)
        return self._core.commit(lambda _: draft, d=_width([rows]), key=key)

    def delete(self, ids: Sequence[str], *, key: str = "") -> Commit:
        """Chunks out, by id; ids that are not there are no error."""

        def build(state: State) -> Draft | Commit:
            found = state.find(ids)
            return Draft(removed_ids=sorted(found)) if found else Commit(state.version, 0, 0)

        self._own()
        return self._core.commit(build, d=0, key=key)

    def set(self, id: str, metadata: Mapping[str, Value], *, key: str = "") -> Commit:
        """Other metadata for a chunk, whose text and vector stay.

        Raises:
            StoreError: there is no such chunk.
        """

        def build(state: State) -> Draft | Commit:
            place = state.find([id]).get(id)
            if place is None:
                raise StoreError(f"{self.path} has no chunk {id!r}", path=str(self.path))
            segment, row = state.segment(place)
            c = segment.chunk(row)
            draft = Draft()
            draft.add([Chunk(c.id, c.text, c.source, c.start, c.heading, metadata)], segment.vectors[row : row + 1])
            return draft

        self._own()
        return self._core.commit(build, d=0, key=key)

    def _own(self) -> None:
        if self._filter is not None or self._past is not None:
            raise StoreError("a bound store, or one at a version, is for reading; write to the store itself")
        self._core.latest()

    # what is read

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

    def _view(self) -> View:
        return self._past[1] if self._past else self._core.latest()

    def _both(self, where: Filter | None) -> Where | None:
        return both(self._filter, None if where is None else parse(where))

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
        return import_module(TEXTS).search_text(view, query, k, test, asked) if view.version else []

    def search_hybrid(
        self, query: str, vector: npt.ArrayLike, k: int, *, where: Filter | None = None
    ) -> list[Hit]:  # fmt: skip
        """The k best by words and by vector together, fused by their ranks; `score` is the cosine.

        Source: Cormack, Clarke, Buettcher, Reciprocal Rank Fusion, SIGIR 2009.
        """
        _check_k(k)
        view, test, asked = self._view(), self._both(where), self.queries(vector)[0]
        texts = import_module(TEXTS)
        return texts.search_hybrid(view, query, asked, k, self._core.metric, test) if view.version else []

    def queries(self, vectors: npt.ArrayLike) -> Floats:
        """Vectors of questions, checked and scaled as the stored ones are."""
        found = np.array(vectors, np.float32, ndmin=2)
        d = self._core.about.get("d")
        if d and found.shape[1] != d:
            raise StoreError(
                f"a question's vector has width {found.shape[1]} and {self.path} holds {d}; use the store's embedder",
                path=str(self.path),
            )
        return scaled(found, self._core.metric, lambda _: "a question's vector")

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

    # what is kept in order

    def compact(self, *, everything: bool = False) -> bool:
        """Merges commits into larger files, with an index where one pays; True if something was merged.

        Writers merge the newest small commits by themselves. This also takes in large files, which can take minutes,
        and builds IVF,SQ8 above 200,000 chunks. At most one process compacts; searches and commits go on meanwhile.

        Args:
            everything: all of it into one file, whatever that costs.
        """
        self._own()
        return self._core.merge(everything=everything) is not None

    def pin(self) -> int:
        """Keeps the newest version for `at` until it is unpinned, and answers its number."""
        return pin(self._core)

    def unpin(self, version: int) -> None:
        """Lets a pinned version go."""
        unpin(self._core, version)

    def stats(self) -> Stats:
        """The store in numbers."""
        return stats(self._core)

    def verify(self) -> list[str]:
        """What is wrong with the store's files, one sentence each; reads all of them."""
        return verify(self._core)


def _build_text(folder: Path, rows: Iterable[tuple[int, str]]) -> None:
    import_module("agentmesh.rag.text").build(folder, rows)


def _check_k(k: int) -> None:
    if k < 1:
        raise StoreError(f"k is {k}; at least one hit has to be asked for")


def _digest(state: State, source: str) -> str:
    found = state.source(source)
    return found.digest if found else ""


def _width(vectors: Sequence[Floats]) -> int:
    return next((v.shape[1] for v in vectors if len(v)), 0)


def _fields(chunk: Chunk) -> dict[str, Any]:
    return {"source": chunk.source, **chunk.metadata}
