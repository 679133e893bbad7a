"""A segment: the file of one commit, or of several commits merged. Written once, verified before it is mapped, immutable.

```
prefix    magic, format, CRC, offset and length of the header, the file's size, the prefix's own CRC
sections  arrays and text, each at a multiple of 64 bytes
header    JSON: kind, rows, width, and for each section its offset, length, CRC and type
```

A truncated file is detected by its size before it is mapped: reading past the end of a mapping kills the process.
"""

import contextlib
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from agentmesh.errors import StoreDamaged, StoreVersion
from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.columns import Array, Column, Mask, mask, row_of
from agentmesh.rag.store.filters import FilterExpr, describe

MAGIC = b"meshrag\x00"
FORMAT = 1
PREFIX = struct.Struct("<8sIIQQQI")  # magic, format, header CRC, header offset, header length, file size, prefix CRC
ALIGN = 64
MMAP_FROM_BYTES = 4 << 20  # smaller files are read, larger ones are mapped
SOURCE, HEADING = "\x00source", "\x00heading"
KEY_DTYPE = np.dtype([("key", "S16"), ("version", "<u8"), ("added", "<u4"), ("removed", "<u4")])
CACHED_MASKS = 16  # filters of which a segment remembers the result


class SegmentWriter:
    """Writes the sections of a segment to a file, then the header, then the prefix."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sections: dict[str, list[Any]] = {}
        self._columns: list[list[str]] = []
        file.write(bytes(ALIGN))

    def array(self, name: str, pieces: Iterable[npt.NDArray[Any]], dtype: Any) -> None:
        """Write a section of numbers, whole or in pieces."""
        dtype = np.dtype(dtype)
        self._add(
            name,
            (np.ascontiguousarray(p, dtype).reshape(-1).view(np.uint8).data for p in pieces if p.size),
            dtype.descr,
        )

    def words(self, name: str, ends: Array, pieces: Iterable[bytes]) -> None:
        """Write a section of texts: their UTF-8 bytes one after the other, and where each ends."""
        self._add(name, pieces, "bytes")
        self.array(f"{name}.ends", [ends], np.int64)

    def json(self, name: str, value: Any) -> None:
        """Write a section of JSON."""
        self._add(name, [json.dumps(value, ensure_ascii=False).encode()], "json")

    def columns(self, columns: Sequence[Column]) -> None:
        """Write the metadata."""
        for i, column in enumerate(columns):
            self._columns.append([column.name, column.kind])
            self.array(f"c{i}", [column.values], column.values.dtype)
            self.array(f"c{i}.present", [column.present], np.bool_)
            if column.table:
                self.json(f"c{i}.table", list(column.table))
            if column.ends is not None:
                self.array(f"c{i}.ends", [column.ends], np.int64)

    def finish(self, header: Mapping[str, Any]) -> None:
        """Write the header and the prefix, which make the file a segment."""
        data = json.dumps({**header, "columns": self._columns, "sections": self._sections}).encode()
        offset = self._file.tell()
        self._file.write(data)
        numbers = (MAGIC, FORMAT, zlib.crc32(data), offset, len(data), offset + len(data))
        prefix = PREFIX.pack(*numbers, 0)[:-4]
        self._file.seek(0)
        self._file.write(prefix + struct.pack("<I", zlib.crc32(prefix)))

    def _add(self, name: str, pieces: Iterable[Any], dtype: Any) -> None:
        start = self._file.tell()
        crc = length = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            length += len(piece)
            self._file.write(piece)
        self._file.write(bytes(-length % ALIGN))
        self._sections[name] = [start, length, crc, dtype]


def hashes(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    """64 bits of each id, uint64 (n,), by which a segment finds it; equality is checked on the id itself."""
    joined = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(joined, np.uint64)


class Segment:
    """One file of a store, of the commits `a` to `b`. Sections are read in place and decoded at their first use."""

    def __init__(self, path: Path, a: int, b: int, buffer: bytes | mmap.mmap, header: dict[str, Any]) -> None:
        self.path, self.a, self.b = path, a, b
        self._buffer, self.header = buffer, header
        self.n, self.d = int(header["n"]), int(header["d"])
        self.kind: str = header["kind"]
        self._masks: dict[str, Mask] = {}

    @classmethod
    def open(cls, path: Path, a: int, b: int) -> "Segment":
        """Open a file; of a large one only prefix and header are verified, its sections by `problems`.

        Raises:
            StoreDamaged: it is truncated or was changed.
            StoreVersion: a newer agentmesh wrote it.
            FileNotFoundError: it was merged and removed; the caller lists the folder again.
        """
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= MMAP_FROM_BYTES:
                segment = cls.parse(path, a, b, file.read())
                if problem := next(segment.problems(), None):
                    raise StoreDamaged(problem, path=str(path.parent), file=path.name)
                return segment
            check_prefix(path, file.read(PREFIX.size), size)
            return cls.parse(path, a, b, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @classmethod
    def parse(cls, path: Path, a: int, b: int, buffer: bytes | mmap.mmap) -> "Segment":
        """A segment from its bytes."""
        offset, length, crc = check_prefix(path, buffer[: PREFIX.size], len(buffer))
        data = buffer[offset : offset + length]
        if zlib.crc32(data) != crc:
            raise _damaged(path, "its header does not have the checksum it was written with")
        return cls(path, a, b, buffer, json.loads(data))

    def problems(self) -> Iterator[str]:
        """The damaged sections, one sentence each; reads the whole file."""
        view = memoryview(self._buffer)
        for name, (start, length, crc, _) in self.header["sections"].items():
            if zlib.crc32(view[start : start + length]) != crc:
                yield f"{self.path.name} is damaged: section {name!r} does not have the checksum it was written with"

    def array(self, name: str) -> Array:
        """A section of numbers, without a copy."""
        start: int
        length: int
        start, length, _, descr = self.header["sections"][name]
        dtype = np.dtype([tuple(f) for f in descr]) if len(descr) > 1 else np.dtype(descr[0][1])
        return np.frombuffer(self._buffer, dtype, length // dtype.itemsize, start)

    def json(self, name: str, default: Any = None) -> Any:
        """A section of JSON; `default` when there is none."""
        if name not in self.header["sections"]:
            return default
        return json.loads(self.bytes(name))

    def bytes(self, name: str, first: int = 0, last: int | None = None) -> bytes:
        """The bytes of a section from `first` to `last`."""
        start, length, _, _ = self.header["sections"][name]
        return bytes(self._buffer[start + first : start + (length if last is None else last)])

    def word(self, name: str, ends: Array, row: int) -> str:
        """One text of a section of texts."""
        return self.bytes(name, int(ends[row - 1]) if row else 0, int(ends[row])).decode()

    @cached_property
    def vectors(self) -> npt.NDArray[np.float32]:
        """float32 (n, d)."""
        return self.array("vectors").reshape(self.n, self.d)

    @cached_property
    def id_ends(self) -> Array:
        """Where each id ends."""
        return self.array("ids.ends")

    @cached_property
    def text_ends(self) -> Array:
        """Where each text ends."""
        return self.array("texts.ends")

    @cached_property
    def row_versions(self) -> Array:
        """The version in which each row was added, int64 (n,)."""
        return self.array("births") if "births" in self.header["sections"] else np.full(self.n, self.a, np.int64)

    @cached_property
    def parts(self) -> Array | None:
        """int32 (n,): 0 for a visible row, else the part of a source that is not complete; None when all are visible."""
        return self.array("parts") if "parts" in self.header["sections"] else None

    @cached_property
    def columns(self) -> list[Column]:
        """All columns; tables of texts are decoded here."""
        columns = []
        for i, (name, kind) in enumerate(self.header["columns"]):
            ends = self.array(f"c{i}.ends") if kind == "list" else None
            table = self.json(f"c{i}.table", [])
            columns.append(Column(name, kind, self.array(f"c{i}"), self.array(f"c{i}.present"), table, ends))
        return columns

    @cached_property
    def by_name(self) -> dict[str, list[Column]]:
        """The columns of each field; the chunks' source is the field `source` unless the metadata has one."""
        by_name: dict[str, list[Column]] = {}
        for column in self.columns:
            by_name.setdefault(column.name, []).append(column)
        by_name.setdefault("source", by_name.get(SOURCE, []))
        return by_name

    @cached_property
    def effects(self) -> dict[str, Any]:
        """What the commit does beside adding rows: removed ids, refused sources, sources with missing parts."""
        return self.json("effects", {}) or {}

    @cached_property
    def sources(self) -> dict[str, Any]:
        """The sources it changes: [digest, chunks, facts, part, of], or null for one that is removed."""
        return self.json("sources", {}) or {}

    def fields(self) -> set[str]:
        """The field names that a filter may use."""
        return {name for name, _ in self.header["columns"] if not name.startswith("\x00")} | {"source"}

    def mask(self, where: FilterExpr) -> Mask:
        """Which rows pass a filter; the results of the last few filters are cached."""
        key = describe(where)
        passed = self._masks.get(key)
        if passed is None:
            passed = mask(where, self.by_name, self.n)
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread evicts at the same time
                while len(self._masks) >= CACHED_MASKS:
                    self._masks.pop(next(iter(self._masks)), None)
            self._masks[key] = passed
        return passed

    def id(self, row: int) -> str:
        """The chunk id of a row."""
        return self.word("ids", self.id_ends, row)

    def text(self, row: int) -> str:
        """The text of a row."""
        return self.word("texts", self.text_ends, row)

    def metadata(self, row: int) -> dict[str, Any]:
        """The metadata of a row."""
        return row_of((c for c in self.columns if not c.name.startswith("\x00")), row)

    def chunk(self, row: int) -> Chunk:
        """The chunk in a row."""
        (source,), (heading,) = self.by_name[SOURCE], self.by_name[HEADING]
        start = int(self.array("starts")[row])
        titles = tuple(json.loads(heading.at(row)))
        return Chunk(self.id(row), self.text(row), source.at(row), start, titles, self.metadata(row))

    def rows_of(self, source: str) -> Array:
        """The rows of a source, alive or not."""
        code = self._sources.get(source)
        return np.flatnonzero(self.by_name[SOURCE][0].values == code) if code is not None else np.zeros(0, np.int64)

    @cached_property
    def _sources(self) -> dict[str, int]:
        return {s: i for column in self.by_name.get(SOURCE, []) for i, s in enumerate(column.table)}

    def hashes_by_row(self) -> npt.NDArray[np.uint64]:
        """The hash of each row's id, uint64 (n,)."""
        by_row = np.empty(self.n, np.uint64)
        by_row[self.array("hashes.rows")] = self.array("hashes")
        return by_row

    def find(self, ids: Sequence[str], hashed: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
        """(index in `ids`, row) of each row that has one of the ids; `hashed` are the `hashes` of the ids."""
        stored, order = self.array("hashes"), self.array("hashes.rows")
        first, last = np.searchsorted(stored, hashed, "left"), np.searchsorted(stored, hashed, "right")
        return [
            (int(i), int(order[p]))
            for i in np.flatnonzero(last > first)
            for p in range(first[i], last[i])
            if self.id(int(order[p])) == ids[int(i)]
        ]


def check_prefix(path: Path, prefix: bytes, size: int) -> tuple[int, int, int]:
    """Verify the prefix of a file of `size` bytes; returns the header's offset, length and CRC.

    Raises:
        StoreDamaged: it is not the prefix of a segment of this size.
        StoreVersion: a newer agentmesh wrote it.
    """
    if len(prefix) < PREFIX.size:
        raise _damaged(path, f"it has {size} bytes, fewer than the {PREFIX.size} of a prefix")
    magic, file_format, crc, offset, length, written_size, prefix_crc = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise _damaged(path, "it does not begin with the bytes of a segment")
    if zlib.crc32(prefix[:-4]) != prefix_crc:
        raise _damaged(path, "its prefix does not have the checksum it was written with")
    if file_format > FORMAT:
        raise StoreVersion(
            f"{path.name} has format {file_format} and this version of agentmesh reads {FORMAT}",
            hint="upgrade agentmesh here",
            path=str(path.parent),
        )
    if size != written_size:
        raise _damaged(path, f"it has {size} bytes of {written_size}")
    return offset, length, crc


def _damaged(path: Path, problem: str) -> StoreDamaged:
    return StoreDamaged(f"{path.name} is damaged: {problem}", path=str(path.parent), file=path.name)
