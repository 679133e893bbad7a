"""Re-embedding: the next generation is built from the stored texts beside the current one, then replaces it atomically.

The last segment of the old generation is a seal that names the new one. Like any commit it fails when its number is
taken, so no commit can be lost between the two. Vectors are cached on disk: after a crash a second call resumes.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from agentmesh.errors import StoreError
from agentmesh.rag.embedders.base import Identity
from agentmesh.rag.store.columns import Array, Mask
from agentmesh.rag.store.compaction import BuildText, Embed, LiveRows, Merge, live_rows, write_merged
from agentmesh.rag.store.filters import Condition
from agentmesh.rag.store.folder import Folder, disk_errors, number_of, set_current, sync
from agentmesh.rag.store.segment import SOURCE
from agentmesh.rag.store.state import State
from agentmesh.rag.store.vector_index import Floats
from agentmesh.rag.store.writer import StoreWriter, scale_vectors, seal_segment

EMBED_BATCH = 256  # texts that are embedded and written at once
CATCH_UP_ROUNDS = 1000
VERSION_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that distinct versions stay distinct

Progress = Callable[[int, int], None]


class VectorCache:
    """Vectors by the hash of their text, in an append-only file; embeds the texts that it does not hold."""

    def __init__(self, path: Path, d: int, embed: Embed, metric: str, total: int, progress: Progress | None) -> None:
        self._path, self._d, self._embed, self._metric = path, d, embed, metric
        self._total, self._progress, self._done = total, progress, 0
        self._record = np.dtype([("text", "V16"), ("vector", np.float32, (d,))])
        self._index: dict[bytes, int] = {}  # hash of a text -> its record
        if path.exists():
            size = path.stat().st_size // self._record.itemsize * self._record.itemsize
            os.truncate(path, size)  # a crash may have cut the last record
            if size:
                records = np.memmap(path, self._record, "r")
                self._index = {t.tobytes(): i for i, t in enumerate(records["text"])}

    def __call__(self, texts: Sequence[str]) -> Floats:
        """The vectors of texts, float32 (len(texts), d)."""
        hashes = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts]
        missing = {h: text for h, text in zip(hashes, texts, strict=True) if h not in self._index}
        new_hashes, new_texts = list(missing), list(missing.values())
        self._report(len(texts) - len(new_texts))
        with open(self._path, "ab") as file:
            for first in range(0, len(new_texts), EMBED_BATCH):
                self._add(file, new_hashes[first : first + EMBED_BATCH], new_texts[first : first + EMBED_BATCH])
        records = np.memmap(self._path, self._record, "r")
        return np.ascontiguousarray(records["vector"][[self._index[h] for h in hashes]])

    def _add(self, file: BinaryIO, hashes: list[bytes], texts: list[str]) -> None:
        vectors = np.array(self._embed(texts), np.float32, ndmin=2)
        if vectors.shape != (len(texts), self._d):
            expected = (len(texts), self._d)
            raise StoreError(f"the embedder made vectors of shape {vectors.shape} instead of {expected}")
        records = np.empty(len(texts), self._record)
        records["text"] = [np.void(h) for h in hashes]
        records["vector"] = scale_vectors(vectors, self._metric, lambda row: f"the vector of {texts[row][:40]!r}")
        file.write(records.tobytes())
        file.flush()
        for text_hash in hashes:
            self._index[text_hash] = len(self._index)
        self._report(len(texts))

    def _report(self, n: int) -> None:
        self._done += n
        if self._progress and n:
            self._progress(min(self._done, self._total), self._total)


def reembed(
    store: StoreWriter, embed: Embed, identity: Identity | None, d: int, *,
    progress: Progress | None = None, build_text: BuildText | None = None,
) -> int:  # fmt: skip
    """Re-embed all texts; returns the version at which the new generation replaced the old one.

    Raises:
        StoreError: the store is empty, another process is re-embedding it, or it is written faster than it is embedded.
    """
    with store.lock:
        store.refresh()
        old = store.folder
        if old is None or store.state is None or not store.state.version:
            raise StoreError(f"{store.path} is empty", hint="add documents first", path=str(store.path))
        total, metric = store.state.snapshot().count(), store.metric
    new = Folder(store.path / f"g{number_of(old.path.name) + 1}")
    with disk_errors(store.path):
        new.temporaries.mkdir(parents=True, exist_ok=True)
    with new.merge_lock() as acquired:
        if not acquired:
            raise StoreError(f"another process is re-embedding {store.path}", hint="wait for it", path=str(store.path))
        settings = {"format": 1, "d": d, "metric": metric, "identity": identity.to_json() if identity else None}
        _begin(new, settings)
        cache = new.path / "vectors.cache"
        vectors = VectorCache(cache, d, embed, metric, total, progress)
        version = _catch_up(store, old, new, vectors, metric, d, build_text)
        with disk_errors(store.path):
            set_current(store.path, new.path.name)
            cache.unlink(missing_ok=True)
    store.expect(identity)
    return version


def _begin(new: Folder, settings: dict[str, object]) -> None:
    """Create the generation; of an earlier attempt only the cached vectors are kept, if the embedder is the same."""
    same = new.settings() == settings
    with disk_errors(new.path.parent):
        for path in new.spans().values():
            path.unlink()
        if not same:
            (new.path / "about.json").unlink(missing_ok=True)
            (new.path / "vectors.cache").unlink(missing_ok=True)
    new.create(settings)


def _catch_up(
    store: StoreWriter, old: Folder, new: Folder, vectors: VectorCache, metric: str, d: int,
    build_text: BuildText | None,
) -> int:  # fmt: skip
    """Copy the commits of the old generation until none is left, then seal it; returns its last version."""
    before: State | None = None
    for _ in range(CATCH_UP_ROUNDS):
        with store.lock:
            store.refresh()
            if store.folder is not None and store.folder.path != old.path:
                raise StoreError(
                    f"{store.path} was re-embedded by another process in the meantime",
                    hint="see its embedder with: agentmesh rag stats",
                    path=str(store.path),
                )
        after, _ = store.at_version(store.latest().version)
        if before is None or after.version > before.version:
            write_merged(new, merge_between(before, after, d), metric, build_text=build_text, embed=vectors)
        before = after
        with disk_errors(store.path):
            temporary = old.write(seal_segment(after.d, new.path.name))
            try:
                if old.publish(temporary, (after.version + 1, after.version + 1)):
                    sync(old.path)
                    return after.version
            finally:
                temporary.unlink(missing_ok=True)
    raise StoreError(
        f"{store.path} is written faster than its texts can be embedded", hint="stop the ingest", path=str(store.path)
    )


def merge_between(before: State | None, after: State, d: int) -> Merge:
    """The commits after one version up to another as one merge, even if their segments have been merged with others."""
    live = live_rows(after, after.segments)
    if before is None:
        return Merge((1, after.version), live, [], after, after.segments, d=d)
    fingerprints = np.concatenate([_fingerprints(p) for p in live]) if live else np.zeros(0, np.uint64)
    dropped = frozenset(before.pending)
    removed_ids: list[str] = []
    for piece in live_rows(before, before.segments):
        still_live = np.isin(_fingerprints(piece), fingerprints) & ~_is_of(piece, dropped)
        removed_ids += [piece.segment.id(int(row)) for row in piece.rows[~still_live & (piece.parts == 0)]]
    newer = [_newer(p, before.version, dropped) for p in live]
    span = (before.version + 1, after.version)
    segments = [s for s in after.segments if s.b > before.version]
    vanished = frozenset(before.sources()) - frozenset(after.sources())  # a merge from the first commit drops them
    return Merge(span, [p for p in newer if len(p.rows)], removed_ids, after, segments, dropped, vanished, d)


def _newer(piece: LiveRows, version: int, sources: frozenset[str]) -> LiveRows:
    """The rows added after a version, and all rows of sources that missed a part: any of these may have been hidden."""
    newer = (piece.segment.row_versions[piece.rows] > version) | _is_of(piece, sources)
    return LiveRows(piece.segment, piece.rows[newer], piece.parts[newer])


def _is_of(piece: LiveRows, sources: frozenset[str]) -> Mask:
    return piece.segment.mask(Condition(SOURCE, "$in", tuple(sorted(sources))))[piece.rows]


def _fingerprints(piece: LiveRows) -> Array:
    """Each row's id and the version it was added in, hashed to uint64 (n,)."""
    segment = piece.segment
    versions = segment.row_versions[piece.rows].astype(np.uint64)
    return np.asarray(segment.hashes_by_row()[piece.rows] ^ (versions * VERSION_MIX))
