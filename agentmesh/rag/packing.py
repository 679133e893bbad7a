"""What a writer gives, checked, and put into the bytes of one commit."""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.errors import StoreError
from agentmesh.rag.chunk import Chunk
from agentmesh.rag.columns import encode
from agentmesh.rag.index import Floats
from agentmesh.rag.segment import HEADING, SOURCE, SegmentWriter, hashes


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
            raise StoreError(f"the id {twice!r} is twice in one commit; every chunk needs its own")
        file = io.BytesIO()
        writer = SegmentWriter(file)
        writer.array("vectors", self.vectors, np.float32)
        hashed = hashes(ids)
        order = np.argsort(hashed, kind="stable")
        writer.array("hashes", [hashed[order]], np.uint64)
        writer.array("hashes.rows", [order], np.uint32)
        _words(writer, "ids", ids)
        _words(writer, "texts", [chunk.text for chunk in self.chunks])
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


def seal(d: int, generation: str) -> bytes:
    """The last segment of a generation: from here on the store is another one."""
    file = io.BytesIO()
    SegmentWriter(file).finish({"kind": "seal", "n": 0, "d": d, "next": generation})
    return file.getvalue()


def _words(writer: SegmentWriter, name: str, words: list[str]) -> None:
    try:
        encoded = [word.encode() for word in words]
    except UnicodeEncodeError as e:
        raise StoreError(
            f"{e.object[max(0, e.start - 20) : e.start]!r} goes on with half a character; mend the text"
        ) from None
    writer.words(name, np.cumsum([len(w) for w in encoded], dtype=np.int64), [b"".join(encoded)])


def checked(chunks: Sequence[Chunk], vectors: npt.ArrayLike, metric: str, source: str | None = None) -> Floats:
    """The vectors as they are kept: float32 (n, d), under "cosine" of unit length.

    Raises:
        StoreError: not one vector a chunk, NaN, zero under "cosine", a chunk without id or of another source.
    """
    found = np.array(vectors, np.float32, ndmin=2)  # a copy: it is scaled here
    n = len(chunks)
    if not n:
        return found.reshape(0, found.shape[-1] if found.size else 0)
    if found.ndim != 2 or len(found) != n:
        raise StoreError(f"{n} chunks came with vectors of shape {found.shape}; one row a chunk is needed")
    for chunk in chunks:
        if not chunk.id or "\x00" in chunk.id:
            raise StoreError(f"a chunk of {chunk.source!r} has the id {chunk.id!r}; an id is text, and not empty")
        if source is not None and chunk.source != source:
            raise StoreError(f"chunk {chunk.id!r} is of {chunk.source!r} and was given for {source!r}")
        if bad := next((name for name in chunk.metadata if name.startswith(("$", "\x00"))), None):
            raise StoreError(f"chunk {chunk.id!r} has a metadata field {bad!r}; a name does not begin with $")
    return scaled(found, metric, lambda row: f"the vector of chunk {chunks[row].id!r}")


def scaled(vectors: Floats, metric: str, name: Any) -> Floats:
    """The vectors, of unit length where the metric wants it; `name(row)` says whose one is.

    Raises:
        StoreError: NaN, infinity, or under "cosine" zero.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    for row in np.flatnonzero(~np.isfinite(lengths))[:1]:
        raise StoreError(f"{name(int(row))} holds NaN or infinity; the embedder is to blame")
    if metric == "cosine":
        for row in np.flatnonzero(lengths == 0)[:1]:
            raise StoreError(f"{name(int(row))} is zero and has no direction; leave out texts without words")
        vectors /= lengths[:, None].astype(np.float32)
    return np.ascontiguousarray(vectors)
