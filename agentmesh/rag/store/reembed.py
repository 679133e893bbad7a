"""Another embedder for a store: a generation is built beside from the stored texts, then it takes over in one commit.

The old generation's last number is a seal that names the new one. Like any commit it is refused when somebody was
quicker, so no commit falls between the two. Vectors are kept as they are made: a rerun goes on where one was killed.
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
from agentmesh.rag.store.compaction import BuildText, Embed, MergedRows, MergeRun, pieces_of, write_run
from agentmesh.rag.store.filters import Condition
from agentmesh.rag.store.folder import Folder, number_of, set_current, sync, writing
from agentmesh.rag.store.segment import SOURCE
from agentmesh.rag.store.state import State
from agentmesh.rag.store.vector_index import Floats
from agentmesh.rag.store.writer import StoreWriter, scale_vectors, seal_segment

BATCH = 256
ROUNDS = 1000
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that versions do not fall together

Progress = Callable[[int, int], None]


class Vectors:
    """Vectors by the text they belong to, in a file that is only appended to."""

    def __init__(self, path: Path, d: int, embed: Embed, metric: str, total: int, progress: Progress | None) -> None:
        self._path, self._d, self._embed, self._metric = path, d, embed, metric
        self._total, self._progress, self._done = total, progress, 0
        self._record = np.dtype([("text", "V16"), ("vector", np.float32, (d,))])
        self._at: dict[bytes, int] = {}
        if path.exists():
            whole = path.stat().st_size // self._record.itemsize * self._record.itemsize
            os.truncate(path, whole)  # the last one may have been cut off
            if whole:
                known = np.memmap(path, self._record, "r")
                self._at = {t.tobytes(): i for i, t in enumerate(known["text"])}

    def __call__(self, texts: Sequence[str]) -> Floats:
        """float32 (len(texts), d): read where they are known, made and kept where not."""
        names = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts]
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in self._at}
        wanted, todo = list(new), list(new.values())
        self._tell(len(texts) - len(todo))
        with open(self._path, "ab") as file:
            for first in range(0, len(todo), BATCH):
                self._add(file, wanted[first : first + BATCH], todo[first : first + BATCH])
        known = np.memmap(self._path, self._record, "r")
        return np.ascontiguousarray(known["vector"][[self._at[name] for name in names]])

    def _add(self, file: BinaryIO, names: list[bytes], texts: list[str]) -> None:
        found = np.array(self._embed(texts), np.float32, ndmin=2)
        if found.shape != (len(texts), self._d):
            raise StoreError(f"{len(texts)} texts came back as vectors of shape {found.shape}, not of width {self._d}")
        records = np.empty(len(texts), self._record)
        records["text"] = [np.void(n) for n in names]
        records["vector"] = scale_vectors(found, self._metric, lambda row: f"the vector of {texts[row][:40]!r}")
        file.write(records.tobytes())
        file.flush()
        for name in names:
            self._at[name] = len(self._at)
        self._tell(len(texts))

    def _tell(self, n: int) -> None:
        self._done += n
        if self._progress and n:
            self._progress(min(self._done, self._total), self._total)


def reembed(
    core: StoreWriter, embed: Embed, identity: Identity | None, d: int, *,
    progress: Progress | None = None, build_text: BuildText | None = None,
) -> int:  # fmt: skip
    """Makes all vectors anew, and answers the version at which the store went over.

    Raises:
        StoreError: the store is empty, somebody else is at it, or it is written faster than it can be embedded.
    """
    with core.lock:
        core.refresh()
        old = core.folder
        if old is None or core.state is None or not core.state.version:
            raise StoreError(f"{core.path} is empty", hint="there is nothing to embed", path=str(core.path))
        total, metric = core.state.view().count(), core.metric
    new = Folder(core.path / f"g{number_of(old.path.name) + 1}")
    with writing(core.path):
        new.scratch.mkdir(parents=True, exist_ok=True)
    with new.alone() as mine:
        if not mine:
            raise StoreError(f"another process is re-embedding {core.path}", hint="wait for it", path=str(core.path))
        about = {"format": 1, "d": d, "metric": metric, "identity": identity.to_json() if identity else None}
        _begin(new, about)
        cache = new.path / "vectors.cache"
        vectors = Vectors(cache, d, embed, metric, total, progress)
        version = _follow(core, old, new, vectors, metric, d, build_text)
        with writing(core.path):
            set_current(core.path, new.path.name)
            cache.unlink(missing_ok=True)
    core.expect(identity)
    return version


def _begin(new: Folder, about: dict[str, object]) -> None:
    """Nothing of an earlier try is kept but the vectors it made, if they are of the same embedder."""
    same = new.about() == about
    with writing(new.path.parent):
        for path in new.spans().values():
            path.unlink()
        if not same:
            (new.path / "about.json").unlink(missing_ok=True)
            (new.path / "vectors.cache").unlink(missing_ok=True)
    new.make(about)


def _follow(
    core: StoreWriter, old: Folder, new: Folder, vectors: Vectors, metric: str, d: int, build_text: BuildText | None
) -> int:
    before: State | None = None
    for _ in range(ROUNDS):
        with core.lock:
            core.refresh()
            if core.folder is not None and core.folder.path != old.path:
                raise StoreError(f"{core.path} moved to another generation in the meantime", path=str(core.path))
        after, _ = core.past(core.latest().version)
        if before is None or after.version > before.version:
            write_run(new, run_between(before, after, d), metric, build_text=build_text, embed=vectors)
        before = after
        with writing(core.path):
            temporary = old.write(seal_segment(after.d, new.path.name))
            try:
                if old.publish(temporary, (after.version + 1, after.version + 1)):
                    sync(old.path)
                    return after.version
            finally:
                temporary.unlink(missing_ok=True)
    raise StoreError(
        f"{core.path} is written faster than its texts can be embedded", hint="stop the ingest", path=str(core.path)
    )


def run_between(before: State | None, after: State, d: int) -> MergeRun:
    """What came after one version, up to another; both as they are read, whatever was merged in between."""
    pieces = pieces_of(after, after.segments)
    if before is None:
        return MergeRun((1, after.version), pieces, [], after, after.segments, d=d)
    old = pieces_of(before, before.segments)
    now = np.concatenate([_row_marks(p) for p in pieces]) if pieces else np.zeros(0, np.uint64)
    dropped = frozenset(before.pending)
    gone = [i for p in old for i in _removed_ids(p, np.isin(_row_marks(p), now) & ~_rows_of(p, dropped))]
    fresh = [_newer(p, before.version, dropped) for p in pieces]
    span = (before.version + 1, after.version)
    segments = [s for s in after.segments if s.b > before.version]
    sources = frozenset(before.sources()) - frozenset(after.sources())  # a merge from the first commit on forgets them
    return MergeRun(span, [p for p in fresh if len(p.rows)], gone, after, segments, dropped, sources, d)


def _newer(piece: MergedRows, version: int, sources: frozenset[str]) -> MergedRows:
    """Rows that came later; of a source that was not whole all rows, since any of them may have been hidden."""
    kept = (piece.segment.births[piece.rows] > version) | _rows_of(piece, sources)
    return MergedRows(piece.segment, piece.rows[kept], piece.parts[kept])


def _removed_ids(piece: MergedRows, kept: Mask) -> list[str]:
    return [piece.segment.id(int(row)) for row in piece.rows[~kept & (piece.parts == 0)]]


def _rows_of(piece: MergedRows, sources: frozenset[str]) -> Mask:
    return piece.segment.mask(Condition(SOURCE, "$in", tuple(sorted(sources))))[piece.rows]


def _row_marks(piece: MergedRows) -> Array:
    """Each row's id and the version it came with, in 64 bits."""
    segment = piece.segment
    hashed = np.empty(segment.n, np.uint64)
    hashed[segment.array("hashes.rows")] = segment.array("hashes")
    return np.asarray(hashed[piece.rows] ^ (segment.births[piece.rows].astype(np.uint64) * MIX))
