"""The newest commits in memory: their rows side by side, appended to and never changed under a reader."""

import bisect
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.columns import Column, Mask, encode, mask
from agentmesh.rag.store.filters import FilterExpr, matches
from agentmesh.rag.store.segment import SOURCE, Segment

SEALED = 1024  # rows whose metadata is encoded once; the rest of a filter is asked row by row


class Memtable:
    """Rows of small segments under one numbering. A view looks at the first `n` of them and keeps its own `alive`."""

    def __init__(self, d: int) -> None:
        self.n = 0
        self._vectors = np.empty((256, d), np.float32)
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._fields: list[dict[str, Any]] = []
        self._sealed: list[dict[str, list[Column]]] = []
        self._names: set[str] = set()
        self._lock = threading.Lock()  # of what is encoded lazily, by whichever search needs it first
        self.by_id: dict[str, list[int]] = {}
        self.by_source: dict[str, list[int]] = {}

    def append(self, segment: Segment) -> range:
        """The rows under which a segment's rows are known here."""
        first, n = self.n, segment.n
        if not n:
            return range(first, first)
        if first + n > len(self._vectors):
            # a view holds a slice of the old array, which stays as it is
            grown = np.empty((max(2 * len(self._vectors), first + n), self._vectors.shape[1]), np.float32)
            grown[:first] = self._vectors[:first]
            self._vectors = grown
        self._vectors[first : first + n] = segment.vectors
        self._segments.append(segment)
        self._starts.append(first)
        for row in range(n):
            self.by_id.setdefault(segment.id(row), []).append(first + row)
        (source,) = segment.by_name[SOURCE]
        for row in range(n):
            self.by_source.setdefault(source.at(row), []).append(first + row)
        self._names |= segment.fields()
        self.n += n
        return range(first, self.n)

    def vectors(self, n: int) -> npt.NDArray[np.float32]:
        """float32 (n, d), the first n rows."""
        return self._vectors[:n]

    def place(self, row: int) -> tuple[Segment, int]:
        """The segment that a row came with, and its row there."""
        i = bisect.bisect_right(self._starts, row) - 1
        return self._segments[i], row - self._starts[i]

    def placed(self) -> list[tuple[int, Segment]]:
        """Each segment with the row that its first row is here."""
        return list(zip(self._starts, self._segments, strict=True))

    def id(self, row: int) -> str:
        """A row's id."""
        segment, row = self.place(row)
        return segment.id(row)

    def text(self, row: int) -> str:
        """A row's text."""
        segment, row = self.place(row)
        return segment.text(row)

    def chunk(self, row: int) -> Chunk:
        """A row as it was given."""
        segment, row = self.place(row)
        return segment.chunk(row)

    def fields(self) -> set[str]:
        """The names a filter may use."""
        return set(self._names)

    def mask(self, where: FilterExpr, n: int) -> Mask:
        """Which of the first n rows pass a filter."""
        out = np.zeros(n, bool)
        with self._lock:
            self._encode(n)
        for block in range(n // SEALED):
            first = block * SEALED
            out[first : first + SEALED] = mask(where, self._sealed[block], SEALED)
        for row in range(n - n % SEALED, n):
            out[row] = matches(where, self._fields[row])
        return out

    def _encode(self, n: int) -> None:
        for row in range(len(self._fields), n):
            segment, at = self.place(row)
            (source,) = segment.by_name[SOURCE]
            self._fields.append({"source": source.at(at), **segment.metadata(at)})
        for first in range(len(self._sealed) * SEALED, n - n % SEALED, SEALED):
            found: dict[str, list[Column]] = {}
            for column in encode(self._fields[first : first + SEALED]):
                found.setdefault(column.name, []).append(column)
            self._sealed.append(found)
