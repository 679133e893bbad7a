"""The writing half of a store: a commit is checked, encoded as a segment, and published under the next number."""

import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import agentmesh.rag.store.follower as follower  # noqa: PLR0402  (RELIST_AFTER_S is read where it is set)
from agentmesh.errors import EmbedderMismatch, StoreError
from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.columns import encode
from agentmesh.rag.store.compaction import BuildText, merge_segments, wants_merge
from agentmesh.rag.store.folder import Folder, Span, current, disk_errors, drop_generations, set_current, sync
from agentmesh.rag.store.segment import HEADING, MMAP_FROM_BYTES, SOURCE, Segment, SegmentWriter, hashes
from agentmesh.rag.store.state import Commit, State
from agentmesh.rag.store.vector_index import Floats


@dataclass(frozen=True, slots=True)
class Replacement:
    """The new chunks of one source, which replace its old ones.

    Args:
        vectors: float32 (n, d), one row for each chunk.
        digest: of the content that the chunks come from.
        expects: the digest that the source must have in the store, "" for none; None replaces whatever is there.
        part: (i, n), from 1: the source changes only when all n parts are committed.
        facts: JSON that `sources()` returns.
    """

    source: str
    chunks: Sequence[Chunk]
    vectors: npt.ArrayLike
    digest: str
    expects: str | None = None
    part: tuple[int, int] = (1, 1)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Draft:
    """A commit that has no number yet."""

    chunks: list[Chunk] = field(default_factory=list)
    vectors: list[Floats] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    sources: dict[str, list[Any] | None] = field(default_factory=dict)
    removed_ids: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, chunks: Sequence[Chunk], vectors: Floats, part: int = 0) -> None:
        """Add rows; those of a part above 0 are hidden until all parts of their source are committed."""
        self.chunks += chunks
        self.vectors.append(vectors)
        self.parts += [part] * len(chunks)

    def replace(self, item: Replacement, vectors: Floats) -> None:
        """Replace the chunks of a source."""
        part, of = item.part
        self.sources[item.source] = [item.digest, len(item.chunks), dict(item.facts), part, of]
        self.add(item.chunks, vectors, part if of > 1 else 0)

    def encode(self, d: int, key: str) -> bytes:
        """The bytes of the segment.

        Args:
            d: the width of its vectors.
            key: of the step that commits; "" for none.

        Raises:
            StoreError: metadata or text that cannot be stored, or two chunks with one id.
        """
        ids = [chunk.id for chunk in self.chunks]
        if len(set(ids)) < len(ids):
            duplicate = Counter(ids).most_common(1)[0][0]
            raise StoreError(f"the id {duplicate!r} is twice in one commit", hint="give every chunk an id of its own")
        file = io.BytesIO()
        writer = SegmentWriter(file)
        writer.array("vectors", self.vectors, np.float32)
        hashed = hashes(ids)
        order = np.argsort(hashed, kind="stable")
        writer.array("hashes", [hashed[order]], np.uint64)
        writer.array("hashes.rows", [order], np.uint32)
        _write_words(writer, "ids", ids)
        _write_words(writer, "texts", [chunk.text for chunk in self.chunks])
        writer.array("starts", [np.array([chunk.start for chunk in self.chunks], np.int64)], np.int64)
        if any(self.parts):
            writer.array("parts", [np.array(self.parts)], np.int32)
        rows = [
            {SOURCE: c.source, HEADING: json.dumps(c.heading, ensure_ascii=False), **c.metadata} for c in self.chunks
        ]
        writer.columns(encode(rows))
        try:
            writer.json("sources", self.sources)
        except TypeError as e:
            raise StoreError(f"the facts of {', '.join(self.sources)} are not JSON ({e})") from None
        effects = {"removed_ids": self.removed_ids, "refused": self.refused}
        writer.json("effects", {name: value for name, value in effects.items() if value})
        writer.finish({"kind": "commit", "n": len(ids), "d": d, "key": key})
        return file.getvalue()


def seal_segment(d: int, generation: str) -> bytes:
    """The bytes of a generation's last segment, which names the next generation."""
    file = io.BytesIO()
    SegmentWriter(file).finish({"kind": "seal", "n": 0, "d": d, "next": generation})
    return file.getvalue()


def _write_words(writer: SegmentWriter, name: str, words: list[str]) -> None:
    try:
        encoded = [word.encode() for word in words]
    except UnicodeEncodeError as e:
        raise StoreError(
            f"{e.object[max(0, e.start - 20) : e.start]!r} is followed by half a surrogate pair",
            hint="remove or replace that character",
        ) from None
    writer.words(name, np.cumsum([len(w) for w in encoded], dtype=np.int64), [b"".join(encoded)])


def check_vectors(chunks: Sequence[Chunk], vectors: npt.ArrayLike, metric: str, source: str | None = None) -> Floats:
    """The vectors of chunks as they are stored: float32 (n, d), of unit length under "cosine".

    Args:
        source: the source that every chunk must have; None accepts any.

    Raises:
        StoreError: not one vector for each chunk, NaN, zero under "cosine", a chunk without id or of another source.
    """
    rows = np.array(vectors, np.float32, ndmin=2)  # a copy, which is scaled in place
    n = len(chunks)
    if not n:
        return rows.reshape(0, rows.shape[-1] if rows.size else 0)
    if rows.ndim != 2 or len(rows) != n:
        raise StoreError(f"{n} chunks have vectors of shape {rows.shape}", hint="give one row for each chunk")
    for chunk in chunks:
        if not chunk.id or "\x00" in chunk.id:
            raise StoreError(
                f"a chunk of {chunk.source!r} has the id {chunk.id!r}", hint="give it a text that is not empty"
            )
        if source is not None and chunk.source != source:
            raise StoreError(f"chunk {chunk.id!r} is of source {chunk.source!r}, not of {source!r}")
        if reserved := next((name for name in chunk.metadata if name.startswith(("$", "\x00"))), None):
            raise StoreError(
                f"chunk {chunk.id!r} has a metadata field {reserved!r}", hint="use a name that does not begin with $"
            )
    return scale_vectors(rows, metric, lambda row: f"the vector of chunk {chunks[row].id!r}")


def scale_vectors(vectors: Floats, metric: str, name: Callable[[int], str]) -> Floats:
    """The vectors, scaled in place to unit length where the metric is "cosine"; `name(row)` names one in an error.

    Raises:
        StoreError: NaN, infinity, or zero under "cosine".
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for row in np.flatnonzero(~np.isfinite(lengths))[:1]:
        raise StoreError(f"{name(int(row))} contains NaN or infinity", hint="check the embedder")
    if metric == "cosine":
        for row in np.flatnonzero(lengths == 0)[:1]:
            raise StoreError(f"{name(int(row))} is zero and has no direction", hint="omit texts without words")
        vectors /= lengths[:, None].astype(np.float32)
    return np.ascontiguousarray(vectors)


# ---- Publishing ---------------------------------------------------------------------------------

log = logging.getLogger("agentmesh.rag")


class StoreWriter(follower.Follower):
    """A store that is also written. The writers of one process take turns."""

    build_text: BuildText | None = None  # writes the text index of a merged segment

    def commit(self, build: Callable[[State], Draft | Commit], *, d: int, key: str = "") -> Commit:
        """Publish a commit under the next number.

        Args:
            build: makes the commit from the newest state, or a result without one; called again when another process
                took the number first.
            d: the width of its vectors, 0 when it has none.
            key: of the step that commits; a second commit with the same key returns the first one's result.
        """
        with self.lock:
            self._ensure_generation(d)
            temporary: Path | None = None
            written, data = None, b""
            try:
                while True:
                    self.refresh()
                    state, folder = self._open_state(), self._open_folder()
                    if key and (first := state.commit_of(key)):
                        return replace(first, repeated=True)
                    draft = build(state)
                    if isinstance(draft, Commit):
                        return draft
                    if temporary is None or (draft.refused, draft.removed_ids) != written:
                        if temporary:
                            temporary.unlink(missing_ok=True)
                        data = draft.encode(self.settings["d"], key)
                        with disk_errors(self.path):
                            temporary = folder.write(data)
                        written = (draft.refused, draft.removed_ids)
                    span = (state.version + 1, state.version + 1)
                    if self._publish(temporary, span):
                        break
            finally:
                if temporary:
                    temporary.unlink(missing_ok=True)
            self._sync(folder, span)
            commit = self._apply_own(state, span, data)
            if wants_merge(state.segments):
                self.merge(by_writer=True)
            return commit

    def _sync(self, folder: Folder, span: Span) -> None:
        try:
            sync(folder.path)
        except OSError as e:
            raise StoreError(
                f"commit {span[0]} of {self.path} is visible, but the disk has not confirmed it ({e.strerror})",
                hint="repeat it with the same key",
                path=str(self.path),
            ) from e

    def _ensure_generation(self, d: int) -> None:
        """Create the first generation if there is none, and check the width of what will be committed."""
        if self.folder is None and not self._find_generation():
            if not d:
                d = self._identity.d if self._identity else 0
            identity = self._identity.to_json() if self._identity else None
            with disk_errors(self.path):
                name = current(self.path)
                Folder(self.path / name).create({"d": d, "metric": self.metric, "identity": identity})
                if not (self.path / "CURRENT").exists():
                    set_current(self.path, name)
            self._find_generation()
        if d and not self.settings["d"]:
            with disk_errors(self.path):
                self._open_folder().set_width(d)
            self._find_generation()
        if d and d != self.settings["d"]:
            raise EmbedderMismatch(
                f"{self.path} holds vectors of width {self.settings['d']} and these have width {d}",
                hint="use the embedder it was filled by, or `agentmesh rag reembed`",
                path=str(self.path),
            )

    def _publish(self, temporary: Path, span: Span) -> bool:
        assert self.folder is not None
        with disk_errors(self.path):
            if not self.folder.publish(temporary, span):
                return False
        if time.monotonic() - self._refreshed < follower.RELIST_AFTER_S:
            return True
        # after a long pause since the refresh, the number may have been used, merged and removed
        if any(a <= span[0] <= b and (a, b) != span for a, b in self.folder.spans()):
            self.folder.file(span).unlink(missing_ok=True)
            self._refreshed = float("-inf")
            return False
        return True

    def _apply_own(self, state: State, span: Span, data: bytes) -> Commit:
        path = self._open_folder().file(span)
        # a large segment is mapped, as by its readers
        segment = Segment.parse(path, *span, data) if len(data) <= MMAP_FROM_BYTES else Segment.open(path, *span)
        commit = state.apply(segment)
        self._opened[span] = segment
        self._chain.append(span)
        self._snapshot = state.snapshot()
        return commit

    def merge(self, *, everything: bool = False, by_writer: bool = False) -> Span | None:
        """Merge segments at the end of the chain; None when nothing was merged, or another process is merging.

        Args:
            everything: merge all segments into one.
            by_writer: merge only what is quick, and log errors: the commit before it has succeeded.

        Raises:
            StoreDamaged: a segment is damaged; nothing was changed.
        """
        with self.lock:
            self.refresh()
            if self.folder is None:
                return None
            folder = self.folder
        try:
            with disk_errors(self.path), folder.merge_lock() as acquired:
                if not acquired:
                    return None
                folder.retire()
                drop_generations(self.path, folder.path.name)
                span = merge_segments(
                    folder, self.settings["d"], self.metric, everything=everything, by_writer=by_writer,
                    build_text=self.build_text,
                )  # fmt: skip
        except StoreError as e:
            if not by_writer:
                raise
            log.warning("%s; the commits of %s were not merged", e, self.path)
            return None
        with self.lock:
            self._listed = float("-inf")
            self.refresh()
        return span
