"""The newest commits in memory: the rows of small segments, appended and never changed while a snapshot reads them."""

import bisect
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.columns import Column, Mask, encode, mask
from agentmesh.rag.store.filters import FilterExpr, matches
from agentmesh.rag.store.segment import SOURCE, Segment

BLOCK_ROWS = 1024  # rows whose metadata is encoded as columns, once; a filter tests the rest row by row


class Memtable:
    """The rows of small segments under one numbering.

    A snapshot reads the first `n` of them, with its own copy of `alive`.
    """

    def __init__(self, d: int) -> None:
        self.n = 0
        self._vectors = np.empty((256, d), np.float32)
        self._segments: list[Segment] = []
        self._starts: list[int] = []
        self._fields: list[dict[str, Any]] = []
        self._columns: list[dict[str, list[Column]]] = []  # of each full block, by field
        self._names: set[str] = set()
        self._lock = threading.Lock()  # for `_fields` and `_columns`, which the first search that needs them fills
        self.by_id: dict[str, list[int]] = {}
        self.by_source: dict[str, list[int]] = {}

    def append(self, segment: Segment) -> range:
        """Append a segment's rows; returns their numbers here."""
        first, n = self.n, segment.n
        if not n:
            return range(first, first)
        if first + n > len(self._vectors):
            # a snapshot holds a slice of the old array, which stays as it is
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
        """The vectors of the first n rows, float32 (n, d)."""
        return self._vectors[:n]

    def place(self, row: int) -> tuple[Segment, int]:
        """The segment of a row, and the row's number there."""
        i = bisect.bisect_right(self._starts, row) - 1
        return self._segments[i], row - self._starts[i]

    def placed(self) -> list[tuple[int, Segment]]:
        """Each segment, with the number that its first row has here."""
        return list(zip(self._starts, self._segments, strict=True))

    def id(self, row: int) -> str:
        """The chunk id of a row."""
        segment, row = self.place(row)
        return segment.id(row)

    def text(self, row: int) -> str:
        """The text of a row."""
        segment, row = self.place(row)
        return segment.text(row)

    def chunk(self, row: int) -> Chunk:
        """The chunk in a row."""
        segment, row = self.place(row)
        return segment.chunk(row)

    def fields(self) -> set[str]:
        """The field names that a filter may use."""
        return set(self._names)

    def mask(self, where: FilterExpr, n: int) -> Mask:
        """Which of the first n rows pass a filter."""
        passed = np.zeros(n, bool)
        with self._lock:
            self._encode(n)
        for block in range(n // BLOCK_ROWS):
            first = block * BLOCK_ROWS
            passed[first : first + BLOCK_ROWS] = mask(where, self._columns[block], BLOCK_ROWS)
        for row in range(n - n % BLOCK_ROWS, n):
            passed[row] = matches(where, self._fields[row])
        return passed

    def _encode(self, n: int) -> None:
        for row in range(len(self._fields), n):
            segment, segment_row = self.place(row)
            (source,) = segment.by_name[SOURCE]
            self._fields.append({"source": source.at(segment_row), **segment.metadata(segment_row)})
        for first in range(len(self._columns) * BLOCK_ROWS, n - n % BLOCK_ROWS, BLOCK_ROWS):
            by_name: dict[str, list[Column]] = {}
            for column in encode(self._fields[first : first + BLOCK_ROWS]):
                by_name.setdefault(column.name, []).append(column)
            self._columns.append(by_name)
