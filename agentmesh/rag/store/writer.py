"""What a writer gives, checked, and put into the bytes of one commit."""

import io
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import agentmesh.rag.store.follower as follower  # noqa: PLR0402  (not the folder, whose face stands above)
from agentmesh.errors import EmbedderMismatch, StoreError
from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.columns import encode
from agentmesh.rag.store.compaction import BuildText, merge_run, wants_merge
from agentmesh.rag.store.folder import Folder, Span, current, drop_generations, set_current, sync, writing
from agentmesh.rag.store.segment import HEADING, SOURCE, WHOLE_BYTES, Segment, SegmentWriter, hashes
from agentmesh.rag.store.state import Commit, State
from agentmesh.rag.store.vector_index import Floats


@dataclass(frozen=True, slots=True)
class Replacement:
    """New chunks of one source, for the old ones of that source.

    `expects` is the digest that the source had when its writer looked, "" for none; None does not ask.
    `part` is (i, n), from 1: nothing of the source changes before all n parts are there.
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
    """One commit before it has a number."""

    chunks: list[Chunk] = field(default_factory=list)
    vectors: list[Floats] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    sources: dict[str, list[Any] | None] = field(default_factory=dict)
    removed_ids: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def add(self, chunks: Sequence[Chunk], vectors: Floats, part: int = 0) -> None:
        """Rows; with a part above 0 they are hidden until their source is whole."""
        self.chunks += chunks
        self.vectors.append(vectors)
        self.parts += [part] * len(chunks)

    def replace(self, item: Replacement, vectors: Floats) -> None:
        """A source's new chunks, for its old ones."""
        part, of = item.part
        self.sources[item.source] = [item.digest, len(item.chunks), dict(item.facts), part, of]
        self.add(item.chunks, vectors, part if of > 1 else 0)

    def encode(self, d: int, key: str) -> bytes:
        """The bytes of the segment.

        Raises:
            StoreError: metadata or text that cannot be kept, an id that is there twice.
        """
        ids = [chunk.id for chunk in self.chunks]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0][0]
            raise StoreError(f"the id {twice!r} is twice in one commit", hint="every chunk needs its own")
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
            raise StoreError(f"the facts of {', '.join(self.sources)} cannot be kept: {e}") from None
        effects = {"removed_ids": self.removed_ids, "refused": self.refused}
        writer.json("effects", {name: value for name, value in effects.items() if value})
        writer.finish({"kind": "commit", "n": len(ids), "d": d, "key": key})
        return file.getvalue()


def seal_segment(d: int, generation: str) -> bytes:
    """The last segment of a generation: from here on the store is another one."""
    file = io.BytesIO()
    SegmentWriter(file).finish({"kind": "seal", "n": 0, "d": d, "next": generation})
    return file.getvalue()


def _write_words(writer: SegmentWriter, name: str, words: list[str]) -> None:
    try:
        encoded = [word.encode() for word in words]
    except UnicodeEncodeError as e:
        raise StoreError(
            f"{e.object[max(0, e.start - 20) : e.start]!r} is followed by half a surrogate pair", hint="fix the text"
        ) from None
    writer.words(name, np.cumsum([len(w) for w in encoded], dtype=np.int64), [b"".join(encoded)])


def check_vectors(chunks: Sequence[Chunk], vectors: npt.ArrayLike, metric: str, source: str | None = None) -> Floats:
    """The vectors as they are kept: float32 (n, d), under "cosine" of unit length.

    Raises:
        StoreError: not one vector a chunk, NaN, zero under "cosine", a chunk without id or of another source.
    """
    found = np.array(vectors, np.float32, ndmin=2)  # a copy: it is scaled here
    n = len(chunks)
    if not n:
        return found.reshape(0, found.shape[-1] if found.size else 0)
    if found.ndim != 2 or len(found) != n:
        raise StoreError(f"{n} chunks came with vectors of shape {found.shape}", hint="one row a chunk is needed")
    for chunk in chunks:
        if not chunk.id or "\x00" in chunk.id:
            raise StoreError(
                f"a chunk of {chunk.source!r} has the id {chunk.id!r}", hint="an id is text, and not empty"
            )
        if source is not None and chunk.source != source:
            raise StoreError(f"chunk {chunk.id!r} is of {chunk.source!r} and was given for {source!r}")
        if bad := next((name for name in chunk.metadata if name.startswith(("$", "\x00"))), None):
            raise StoreError(f"chunk {chunk.id!r} has a metadata field {bad!r}", hint="a name does not begin with $")
    return scale_vectors(found, metric, lambda row: f"the vector of chunk {chunks[row].id!r}")


def scale_vectors(vectors: Floats, metric: str, name: Any) -> Floats:
    """The vectors, of unit length where the metric wants it; `name(row)` says whose one is.

    Raises:
        StoreError: NaN, infinity, or under "cosine" zero.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for row in np.flatnonzero(~np.isfinite(lengths))[:1]:
        raise StoreError(f"{name(int(row))} contains NaN or infinity, which comes from the embedder")
    if metric == "cosine":
        for row in np.flatnonzero(lengths == 0)[:1]:
            raise StoreError(f"{name(int(row))} is zero and has no direction", hint="omit texts without words")
        vectors /= lengths[:, None].astype(np.float32)
    return np.ascontiguousarray(vectors)


# ---- One process's hold on a store --------------------------------------------------------------

log = logging.getLogger("agentmesh.rag")


class StoreWriter(follower.Follower):
    """A store that is also written. Writers of one process take turns."""

    build_text: BuildText | None = None  # what writes an index of words beside a merged file

    def commit(self, build: Callable[[State], Draft | Commit], *, d: int, key: str = "") -> Commit:
        """Publishes one commit under the next number.

        Args:
            build: from what is there to what is to be added; asked again when somebody else was quicker.
            d: width of its vectors, 0 when it has none.
            key: of the step that writes; the second commit with one key answers the first.
        """
        with self.lock:
            self._make(d)
            temporary: Path | None = None
            written, data = None, b""
            try:
                while True:
                    self.refresh()
                    state, folder = self._writable()
                    if key and (first := state.commit_of(key)):
                        return Commit(first.version, first.added, first.removed, True, first.refused)
                    draft = build(state)
                    if isinstance(draft, Commit):
                        return draft
                    if temporary is None or (draft.refused, draft.removed_ids) != written:
                        if temporary:
                            temporary.unlink(missing_ok=True)
                        data = draft.encode(self.about["d"], key)
                        with writing(self.path):
                            temporary = folder.write(data)
                        written = (draft.refused, draft.removed_ids)
                    span = (state.version + 1, state.version + 1)
                    if self._publish(temporary, span):
                        break
            finally:
                if temporary:
                    temporary.unlink(missing_ok=True)
            self._confirm(folder, span)
            done = self._take_in(state, span, data)
            if wants_merge(state.segments):
                self.merge(light=True)
            return done

    def _confirm(self, folder: Folder, span: Span) -> None:
        try:
            sync(folder.path)
        except OSError as e:
            raise StoreError(
                f"commit {span[0]} of {self.path} is there, but the disk has not confirmed it ({e.strerror})",
                hint="repeat it with the same key",
                path=str(self.path),
            ) from e

    def _make(self, d: int) -> None:
        if self.folder is None and not self._find_generation():
            if not d:
                d = self._identity.d if self._identity else 0
            identity = self._identity.to_json() if self._identity else None
            about = {"d": d, "metric": self.metric, "identity": identity}
            with writing(self.path):
                name = current(self.path)
                Folder(self.path / name).make(about)
                if not (self.path / "CURRENT").exists():
                    set_current(self.path, name)
            self._find_generation()
        if d and not self.about["d"]:
            with writing(self.path):
                self._writable_folder().widen(d)
            self._find_generation()
        if d and d != self.about["d"]:
            raise EmbedderMismatch(
                f"{self.path} holds vectors of width {self.about['d']} and was given some of width {d}",
                hint="use the embedder it was filled by, or `agentmesh rag reembed`",
                path=str(self.path),
            )

    def _publish(self, temporary: Path, span: Span) -> bool:
        assert self.folder is not None
        with writing(self.path):
            if not self.folder.publish(temporary, span):
                return False
        if time.monotonic() - self._checked < follower.FRESH_S:
            return True
        # long asleep between the listing and the link: the number may have been given, merged and cleaned away
        if any(a <= span[0] <= b and (a, b) != span for a, b in self.folder.spans()):
            self.folder.file(span).unlink(missing_ok=True)
            self._checked = float("-inf")
            return False
        return True

    def _take_in(self, state: State, span: Span, data: bytes) -> Commit:
        assert self.folder is not None
        path = self.folder.file(span)
        # a large one is mapped, as its readers do
        segment = Segment.parse(path, *span, data) if len(data) <= WHOLE_BYTES else Segment.open(path, *span)
        done = state.apply(segment)
        self._opened[span] = segment
        self._chain.append(span)
        self._view = state.view()
        return done

    def merge(self, *, everything: bool = False, light: bool = False) -> Span | None:
        """Merges the end of the chain, unless somebody else is at it; None when nothing was merged.

        Raises:
            StoreDamaged: a file cannot be trusted; nothing was changed. A writer that merges by the way only says so.
        """
        with self.lock:
            self.refresh()
            if self.folder is None:
                return None
            folder = self.folder
        try:
            with writing(self.path), folder.alone() as mine:
                if not mine:
                    return None
                folder.retire()
                drop_generations(self.path, folder.path.name)
                span = merge_run(
                    folder, self.about["d"], self.metric, everything=everything, light=light, build_text=self.build_text
                )
        except StoreError as e:
            if not light:
                raise
            log.warning("%s; the commits of %s were not merged", e, self.path)
            return None
        with self.lock:
            self._listed = float("-inf")
            self.refresh()
        return span
