"""The FAISS store: a folder that many processes read and write at once, safe against crashes of any of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy.typing as npt

from agentmesh.errors import StoreConflict, StoreDamaged, StoreError, StoreVersion
from agentmesh.rag.documents import Chunk, Value
from agentmesh.rag.embedders.base import Identity
from agentmesh.rag.store.compaction import SIZE_RATIO
from agentmesh.rag.store.filters import FilterExpr
from agentmesh.rag.store.folder import disk_errors, name_of, sync
from agentmesh.rag.store.reader import StoreReader
from agentmesh.rag.store.reembed import reembed
from agentmesh.rag.store.segment import Segment
from agentmesh.rag.store.snapshot import Snapshot
from agentmesh.rag.store.state import Commit, State
from agentmesh.rag.store.vector_index import Floats
from agentmesh.rag.store.writer import Draft, Replacement, StoreWriter, check_vectors

COMPACT_FROM_SEGMENTS = 4  # with more large segments than this a compaction pays
COMPACT_FROM_DEAD_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Stats:
    """What a store holds, and what a search of it costs.

    Args:
        pending: sources of which some parts are not committed yet.
        embedder: its name; "" for none.
        dead: rows that were replaced or removed and still take space.
        in_memory: rows of the newest commits, which each process reads into memory.
        indexes: by segment file, the number of lists that a search probes.
        damaged: the names of files that cannot be read.
    """

    version: int = 0
    generation: str = "g1"
    chunks: int = 0
    sources: int = 0
    pending: int = 0
    d: int = 0
    metric: str = "cosine"
    embedder: str = ""
    files: int = 0
    bytes: int = 0
    dead: int = 0
    in_memory: int = 0
    indexes: dict[str, int] = field(default_factory=dict)
    pins: tuple[int, ...] = ()
    damaged: tuple[str, ...] = ()
    wants_compaction: bool = False


class FaissStore(StoreReader):
    """Chunks with their vectors, in a folder.

    Opening does no I/O; the first search or commit reads the folder, in each process. Every method may be called from
    any thread. When the method of a commit returns, the commit is on disk and every process sees it; when it raises,
    nothing changed.
    """

    def __init__(self, path: str | Path, *, metric: str | None = None, identity: Identity | None = None) -> None:
        """A store in a folder, which the first commit creates.

        Args:
            metric: "cosine" or "l2"; None takes the folder's own, and "cosine" for a new one.
            identity: of the embedder of the vectors; a store with vectors of another embedder refuses it.
        """
        self.path = Path(path)
        self._writer = StoreWriter(self.path, metric, identity)
        self._writer.build_text = _build_text if find_spec("tantivy") else None
        self._filter: FilterExpr | None = None
        self._past: tuple[State, Snapshot] | None = None

    # ---- commits -------------------------------------------------------------------------------
    def replace(
        self, source: str, chunks: Sequence[Chunk], vectors: npt.ArrayLike, *, digest: str,
        expects: str | None = None, key: str = "", part: tuple[int, int] = (1, 1), facts: Mapping[str, Any] | None = None,
    ) -> Commit:  # fmt: skip
        """Replace the chunks of a source in one commit.

        Args:
            digest: of the content that the chunks come from.
            expects: the digest that the source must have in the store, "" for none; None replaces whatever is there.
            key: of the step that commits; a second commit with the same key returns the first one's result and changes
                nothing.
            part: (i, n), from 1, of a source that is too large for one commit; it changes when all n are committed.
            facts: JSON that `sources()` returns.

        Raises:
            StoreConflict: the source has another digest than expected.
            StoreError: a chunk or vector cannot be stored.
        """
        item = Replacement(source, chunks, vectors, digest, expects, part, facts or {})
        commit = self.replace_many([item], key=key)
        if commit.refused:
            facts_now = self.source(source)
            stored = facts_now.digest if facts_now else ""
            raise StoreConflict(
                f"{source!r} has changed since it was read: expected {expects!r}, found {stored!r}", hint="read it again",
                path=str(self.path), source=source, expected=expects, found=stored,
            )  # fmt: skip
        return commit

    def replace_many(self, items: Sequence[Replacement], *, key: str = "") -> Commit:
        """Replace several sources in one commit; one without the expected digest is unchanged and named in `refused`."""
        names = [item.source for item in items]
        if duplicates := {name for name in names if names.count(name) > 1}:
            raise StoreError(
                f"the source {min(duplicates)!r} is twice in one commit", hint="give all its chunks in one Replacement"
            )
        for item in items:
            if not 1 <= item.part[0] <= item.part[1]:
                raise StoreError(f"part {item.part} of {item.source!r} is not (i, n) with 1 <= i <= n")
        self._check_writable()
        metric = self._writer.metric
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

        return self._writer.commit(build, d=_width(vectors), key=key)

    def remove(self, sources: Sequence[str], *, expects: Mapping[str, str] | None = None, key: str = "") -> Commit:
        """Remove sources with all their chunks; one without the digest in `expects` stays and is named in `refused`."""

        def build(state: State) -> Draft | Commit:
            draft = Draft()
            for source in sources:
                if expects is not None and source in expects and expects[source] != _digest(state, source):
                    draft.refused.append(source)
                elif state.source(source) or source in state.pending or any(map(state.alive, state.rows_of(source))):
                    draft.sources[source] = None
            return draft if draft.sources else Commit(state.version, 0, 0, refused=tuple(draft.refused))

        self._check_writable()
        return self._writer.commit(build, d=0, key=key)

    def upsert(self, chunks: Sequence[Chunk], vectors: npt.ArrayLike, *, key: str = "") -> Commit:
        """Add chunks, or replace those with the same ids; the facts of their sources stay."""
        self._check_writable()
        rows = check_vectors(chunks, vectors, self._writer.metric)
        draft = Draft()
        draft.add(chunks, rows)
        return self._writer.commit(lambda _: draft, d=_width([rows]), key=key)

    def delete(self, ids: Sequence[str], *, key: str = "") -> Commit:
        """Remove chunks by id; unknown ids are ignored."""

        def build(state: State) -> Draft | Commit:
            places = state.find(ids)
            return Draft(removed_ids=sorted(places)) if places else Commit(state.version, 0, 0)

        self._check_writable()
        return self._writer.commit(build, d=0, key=key)

    def set_metadata(self, chunk_id: str, metadata: Mapping[str, Value], *, key: str = "") -> Commit:
        """Replace the metadata of a chunk; its text and vector stay.

        Raises:
            StoreError: there is no such chunk.
        """

        def build(state: State) -> Draft | Commit:
            place = state.find([chunk_id]).get(chunk_id)
            if place is None:
                raise StoreError(f"{self.path} has no chunk {chunk_id!r}", path=str(self.path))
            segment, row = state.segment(place)
            c = segment.chunk(row)
            draft = Draft()
            draft.add([Chunk(c.id, c.text, c.source, c.start, c.heading, metadata)], segment.vectors[row : row + 1])
            return draft

        self._check_writable()
        return self._writer.commit(build, d=0, key=key)

    def _check_writable(self) -> None:
        if self._filter is not None or self._past is not None:
            raise StoreError("a bound store, or one at a version, is read-only", hint="write to the store itself")
        self._writer.latest()

    # ---- maintenance ---------------------------------------------------------------------------
    def compact(self, *, everything: bool = False) -> bool:
        """Merge segments into larger ones, and index those; whether anything was merged.

        Writers merge the newest small segments after their commits. This also merges large ones, which can take
        minutes, and builds IVF,SQ8 above 200,000 chunks. Only one process compacts; searches and commits continue
        meanwhile.

        Args:
            everything: merge all segments into one, whatever the cost.
        """
        self._check_writable()
        return self._writer.merge(everything=everything) is not None

    def reembed(
        self, embed: Callable[[Sequence[str]], npt.ArrayLike], *, identity: Identity | None = None, d: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:  # fmt: skip
        """Re-embed the stored texts, then replace the old vectors atomically; returns the version.

        Searches and commits continue with the old vectors meanwhile. After a crash, a second call resumes.

        Args:
            embed: texts to float32 (len(texts), d), such as an embedder's `documents`.
            identity: of the embedder.
            d: the width of the new vectors; that of `identity` when 0.
            progress: called with the number of chunks that are done, and of all.
        """
        self._check_writable()
        width = d or (identity.d if identity else 0)
        if not width:
            raise StoreError("the width of the new vectors is not known", hint="give `d`, or an identity with a width")
        return reembed(self._writer, embed, identity, width, progress=progress, build_text=self._writer.build_text)

    def pin(self) -> int:
        """Keep the newest version readable by `at` until it is unpinned; returns its number.

        Raises:
            StoreError: the store is empty, or cannot be written.
        """
        writer = self._writer
        with writer.lock:
            writer.refresh()
            if writer.state is None or writer.folder is None or not writer.state.version:
                raise StoreError(f"{self.path} is empty", hint="add documents first", path=str(self.path))
            version, folder = writer.state.version, writer.folder
        with disk_errors(self.path):
            folder.pinned.mkdir(exist_ok=True)
            (folder.pinned / str(version)).touch()
            sync(folder.pinned)
        return version

    def unpin(self, version: int) -> None:
        """Allow a pinned version to be removed: by the first compaction an hour after its files were replaced.

        Raises:
            StoreVersion: it is not pinned.
        """
        with self._writer.lock:
            self._writer.refresh()
            folder = self._writer.folder
        if folder is None or version not in folder.pins():
            raise StoreVersion(f"version {version} of {self.path} is not pinned", path=str(self.path))
        with disk_errors(self.path):
            (folder.pinned / str(version)).unlink(missing_ok=True)

    def stats(self) -> Stats:
        """The store in numbers."""
        writer = self._writer
        with writer.lock:
            writer.refresh()
            state, folder = writer.state, writer.folder
            if state is None or folder is None:
                return Stats(metric=writer.metric)
            snapshot = state.snapshot()
            chunks = snapshot.count()
            dead = sum(part.n for part in snapshot.parts) - chunks
            sizes = [s.path.stat().st_size for s in state.segments if s.path.exists()]
            return Stats(
                version=state.version, generation=folder.path.name, chunks=chunks, sources=len(state.sources()),
                pending=len(state.pending), d=state.d, metric=writer.metric,
                embedder=writer.identity.name if writer.identity else "", files=len(sizes), bytes=sum(sizes), dead=dead,
                in_memory=snapshot.memtable.n, indexes=_indexes(snapshot),
                pins=tuple(sorted(folder.pins())), damaged=tuple(sorted(state.damaged)),
                wants_compaction=len(state.large_segments) > COMPACT_FROM_SEGMENTS
                or dead > max(COMPACT_FROM_DEAD_ROWS, chunks // SIZE_RATIO),
            )  # fmt: skip

    def verify(self) -> list[str]:
        """The damaged and missing files, one sentence each; reads all files."""
        with self._writer.lock:
            self._writer.refresh()
            folder = self._writer.folder
        if folder is None:
            return []
        links, gaps = folder.chain_and_gaps()
        problems = [f"{name_of(gap)} of {folder.path} is missing" for gap in gaps]
        for span in links:
            try:
                problems += list(Segment.open(folder.file(span), *span).problems())
            except StoreDamaged as e:
                problems.append(str(e))
            except FileNotFoundError:  # merged and removed since the listing
                continue
        return problems


def _indexes(snapshot: Snapshot) -> dict[str, int]:
    indexes = [(p.rows, p.index) for p in snapshot.large_segments]
    return {rows.path.name: index.nprobe for rows, index in indexes if isinstance(rows, Segment) and index}


def _build_text(folder: Path, rows: Iterable[tuple[int, str]]) -> None:
    import_module("agentmesh.rag.store.text_index").build_text_index(folder, rows)


def _digest(state: State, source: str) -> str:
    facts = state.source(source)
    return facts.digest if facts else ""


def _width(vectors: Sequence[Floats]) -> int:
    return next((v.shape[1] for v in vectors if len(v)), 0)
