"""The FAISS store: a folder that many processes read and write at once, and that no crash can harm."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy.typing as npt

from agentmesh.errors import StoreConflict, StoreError
from agentmesh.rag.documents import Chunk, Value
from agentmesh.rag.embedders.base import Identity
from agentmesh.rag.store.filters import FilterExpr
from agentmesh.rag.store.maintenance import Stats, pin, stats, unpin, verify
from agentmesh.rag.store.reader import StoreReader
from agentmesh.rag.store.reembed import reembed
from agentmesh.rag.store.snapshot import Snapshot
from agentmesh.rag.store.state import Commit, State
from agentmesh.rag.store.vector_index import Floats
from agentmesh.rag.store.writer import Draft, Replacement, StoreWriter, check_vectors


class FaissStore(StoreReader):
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
        self._core = StoreWriter(self.path, metric, identity)
        self._core.build_text = _build_text if find_spec("tantivy") else None
        self._filter: FilterExpr | None = None
        self._past: tuple[State, Snapshot] | None = None

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
                f"{source!r} has changed since it was read: expected {expects!r}, found {had!r}", hint="read it again",
                path=str(self.path), source=source, expected=expects, found=had,
            )  # fmt: skip
        return done

    def replace_many(self, items: Sequence[Replacement], *, key: str = "") -> Commit:
        """Several sources in one commit. A source that is not as expected is left as it is and named in `refused`."""
        names = [item.source for item in items]
        if twice := {name for name in names if names.count(name) > 1}:
            raise StoreError(f"the source {min(twice)!r} is twice in one commit", hint="give all its chunks together")
        for item in items:
            if not 1 <= item.part[0] <= item.part[1]:
                raise StoreError(f"part {item.part} of {item.source!r}: (i, n) with 1 <= i <= n is needed")
        self._own()
        metric = self._core.metric
        vectors = [check_vectors(item.chunks, item.vectors, metric, item.source) for item in items]

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
        rows = check_vectors(chunks, vectors, self._core.metric)
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
            raise StoreError("a bound store, or one at a version, is for reading", hint="write to the store itself")
        self._core.latest()

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

    def reembed(
        self, embed: Callable[[Sequence[str]], npt.ArrayLike], *, identity: Identity | None = None, d: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:  # fmt: skip
        """Makes all vectors anew from the stored texts and goes over to them in one step; the version is answered.

        Searches and commits go on with the old ones meanwhile. Killed, it goes on where it was when it is called again.

        Args:
            embed: texts to vectors, one a text: an embedder's `documents`.
            identity: of the embedder; its width is taken if `d` is not given.
            progress: is told how many of how many chunks are done.
        """
        self._own()
        width = d or (identity.d if identity else 0)
        if not width:
            raise StoreError("the width of the new vectors is not known", hint="give d or an identity that says it")
        return reembed(self._core, embed, identity, width, progress=progress, build_text=self._core.build_text)

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
    import_module("agentmesh.rag.store.text_index").build(folder, rows)


def _digest(state: State, source: str) -> str:
    found = state.source(source)
    return found.digest if found else ""


def _width(vectors: Sequence[Floats]) -> int:
    return next((v.shape[1] for v in vectors if len(v)), 0)
