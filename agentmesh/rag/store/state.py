"""The state of a store at one version: its segments applied one after the other, in the order of the chain.

A State belongs to one thread at a time; a Snapshot of it may be read by any thread.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from agentmesh.rag.store.columns import Mask
from agentmesh.rag.store.memtable import Memtable
from agentmesh.rag.store.segment import Segment, hashes
from agentmesh.rag.store.snapshot import Snapshot, SnapshotPart

SMALL_ROWS = 1024  # the rows of segments with fewer rows are copied into the memtable
IN_MEMTABLE = -1

Place = tuple[int, int]  # (index in `large_segments` or IN_MEMTABLE, row)


@dataclass(frozen=True, slots=True)
class Commit:
    """The result of a commit, counted in chunks."""

    version: int
    added: int
    removed: int
    repeated: bool = False  # its key was committed before: this is the first commit's result, and nothing changed
    refused: tuple[str, ...] = ()  # sources whose digest was not the expected one; they are unchanged


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """A source in a store: its content's digest, its number of chunks, and the facts its writer added."""

    digest: str
    chunks: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Pending:
    """A source of which some parts were committed; its rows are hidden until all `of` parts are."""

    digest: str
    of: int
    parts: dict[int, list[Place]] = field(default_factory=dict)


class SegmentState:
    """A large segment, and which of its rows are alive."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.alive: Mask = np.ones(segment.n, bool) if segment.parts is None else segment.parts == 0
        self.part: SnapshotPart | None = None  # of the last snapshot; replaced when `alive` changes

    def set(self, row: int, alive: bool) -> None:
        """Change one row; copy on write if a snapshot shares the mask."""
        if self.part is not None:
            self.alive, self.part = self.alive.copy(), None
        self.alive[row] = alive


def key_hash(key: str) -> bytes:
    """A step's key as it is stored, 16 bytes; the last one is not 0, which numpy would strip."""
    return blake2b(key.encode(), digest_size=15).digest() + b"k"


class State:
    """Everything that a store holds at one version.

    Args:
        d: the vectors' width.
    """

    def __init__(self, d: int) -> None:
        self.d, self.version = d, 0
        self.large_segments: list[SegmentState] = []
        self.memtable = Memtable(d)
        self._alive: Mask = np.zeros(256, bool)  # of the memtable's rows
        self.segments: list[Segment] = []
        self.damaged: dict[str, str] = {}
        self.pending: dict[str, Pending] = {}
        self.facts: dict[str, SourceFacts | None] = {}
        self.keys: dict[bytes, Commit] = {}
        self._merged: list[Segment] = []  # their facts and keys are looked up in the files

    def apply(self, segment: Segment) -> Commit:
        """Apply the next segment of the chain."""
        removed = self._mark_dead(self._find(segment.effects.get("removed_ids", [])))
        if segment.kind == "merged":
            self._apply_merged(segment)
            commit = Commit(segment.b, segment.n, removed)
        else:
            removed += self._apply_commit(segment)
            refused = tuple(segment.effects.get("refused", ()))
            commit = Commit(segment.b, segment.n, removed, refused=refused)
            if key := segment.header.get("key"):
                self.keys[key_hash(key)] = commit
        self.segments.append(segment)
        self.version = segment.b
        return commit

    def skip(self, version: int, file: str, problem: str) -> None:
        """Note a segment that cannot be read, and continue after it."""
        self.damaged[file] = problem
        self.version = version

    def _apply_merged(self, segment: Segment) -> None:
        if self.facts:
            for source in segment.sources:
                self.facts.pop(source, None)
        self._merged.append(segment)
        for source in segment.effects.get("dropped", ()):
            self.pending.pop(source, None)
        places = self._add(segment)
        for source, (digest, of, parts) in segment.effects.get("pending", {}).items():
            rows = segment.rows_of(source)
            assert segment.parts is not None or not len(rows)
            numbers = segment.parts[rows] if segment.parts is not None else rows
            staged = {p: [places[r] for r, m in zip(rows, numbers, strict=True) if m == p] for p in parts}
            self.pending[source] = Pending(digest, of, staged)

    def _apply_commit(self, segment: Segment) -> int:
        removed, staged = 0, {}
        for source, record in segment.sources.items():
            if record is not None and record[4] > 1:
                staged[source] = record
                continue
            removed += self._mark_dead(self.rows_of(source))
            self.pending.pop(source, None)
            self.facts[source] = facts_of(record)
        visible = [segment.id(r) for r in range(segment.n) if segment.parts is None or not segment.parts[r]]
        removed += self._mark_dead(self._find(visible))
        places = self._add(segment)
        for source, record in staged.items():
            removed += self._stage(source, record, [places[r] for r in segment.rows_of(source)])
        return removed

    def _stage(self, source: str, record: list[Any], places: list[Place]) -> int:
        digest, _, facts, part, of = record
        pending = self.pending.get(source)
        if pending is None or (pending.digest, pending.of) != (digest, of):
            pending = self.pending[source] = Pending(digest, of)
        pending.parts[part] = places
        if len(pending.parts) < of:
            return 0
        del self.pending[source]
        places = [place for number in sorted(pending.parts) for place in pending.parts[number]]
        removed = self._mark_dead(self.rows_of(source)) + self._mark_dead(self._find([self.id(p) for p in places]))
        for place in places:
            self._set(place, True)
        self.facts[source] = SourceFacts(digest, len(places), facts)
        return removed

    def _add(self, segment: Segment) -> Sequence[Place]:
        if segment.n >= SMALL_ROWS or segment.kind == "merged":
            self.large_segments.append(SegmentState(segment))
            return _RowPlaces(len(self.large_segments) - 1, 0)
        rows = self.memtable.append(segment)
        while self.memtable.n > len(self._alive):
            self._alive = np.concatenate([self._alive, np.zeros_like(self._alive)])
        self._alive[rows.start : rows.stop] = True if segment.parts is None else segment.parts == 0
        return _RowPlaces(IN_MEMTABLE, rows.start)

    def _find(self, ids: Sequence[str]) -> Iterator[Place]:
        if not ids:
            return
        hashed = hashes(ids)
        for index, large in enumerate(self.large_segments):
            for _, row in large.segment.find(ids, hashed):
                yield index, row
        for id in ids:
            for row in self.memtable.by_id.get(id, ()):
                yield IN_MEMTABLE, row

    def find(self, ids: Sequence[str]) -> dict[str, Place]:
        """The places of the live rows with these ids."""
        return {self.id(place): place for place in self._find(ids) if self.alive(place)}

    def rows_of(self, source: str) -> Iterator[Place]:
        """The places of all rows of a source, alive or not."""
        for index, large in enumerate(self.large_segments):
            for row in large.segment.rows_of(source):
                yield index, int(row)
        for row in self.memtable.by_source.get(source, ()):
            yield IN_MEMTABLE, row

    def alive(self, place: Place) -> bool:
        """Whether a row is alive."""
        index, row = place
        return bool(self._alive[row] if index == IN_MEMTABLE else self.large_segments[index].alive[row])

    def memtable_alive(self, first: int, n: int) -> Mask:
        """Which of the memtable's rows `first` to `first + n` are alive."""
        return self._alive[first : first + n]

    def id(self, place: Place) -> str:
        """A row's id."""
        index, row = place
        return self.memtable.id(row) if index == IN_MEMTABLE else self.large_segments[index].segment.id(row)

    def segment(self, place: Place) -> tuple[Segment, int]:
        """The segment that holds a row, and the row there."""
        index, row = place
        return self.memtable.place(row) if index == IN_MEMTABLE else (self.large_segments[index].segment, row)

    def _set(self, place: Place, alive: bool) -> None:
        index, row = place
        if index == IN_MEMTABLE:
            self._alive[row] = alive  # snapshots have a copy
        else:
            self.large_segments[index].set(row, alive)

    def _mark_dead(self, places: Iterable[Place]) -> int:
        marked = 0
        for place in places:
            if self.alive(place):
                self._set(place, False)
                marked += 1
        return marked

    def source(self, source: str) -> SourceFacts | None:
        """The facts of a source; None when the store has no source of this name."""
        if source in self.facts:
            return self.facts[source]
        for segment in reversed(self._merged):
            if source in segment.sources:
                return facts_of(segment.sources[source])
        return None

    def sources(self) -> dict[str, SourceFacts]:
        """All sources with their facts."""
        by_source: dict[str, SourceFacts | None] = {}
        for segment in self._merged:
            by_source.update((s, facts_of(f)) for s, f in segment.sources.items())
        by_source.update(self.facts)
        return {source: facts for source, facts in by_source.items() if facts is not None}

    def commit_of(self, key: str) -> Commit | None:
        """The commit that was made with a key; None when there is none."""
        hashed = key_hash(key)
        if hashed in self.keys:
            return self.keys[hashed]
        for segment in reversed(self._merged):
            rows = segment.array("keys")
            i = int(np.searchsorted(rows["key"], np.bytes_(hashed)))
            if i < len(rows) and rows["key"][i] == hashed:
                row = rows[i]
                refused = tuple(segment.effects.get("refusals", {}).get(hashed.hex(), ()))
                return Commit(int(row["version"]), int(row["added"]), int(row["removed"]), refused=refused)
        return None

    def snapshot(self) -> Snapshot:
        """This version as searches see it, whatever is applied later."""
        parts = []
        for large in self.large_segments:
            if large.part is None:
                large.part = SnapshotPart(large.segment, large.alive, large.segment.vectors)
            parts.append(large.part)
        n = self.memtable.n
        memtable = SnapshotPart(self.memtable, self._alive[:n].copy(), self.memtable.vectors(n))
        return Snapshot(self.version, tuple(parts), memtable)


class _RowPlaces(Sequence[Place]):
    """The places of a segment's rows: row r is at (index, first + r)."""

    def __init__(self, index: int, first: int) -> None:
        self._index, self._first = index, first

    def __getitem__(self, row: Any) -> Any:
        return self._index, self._first + int(row)

    def __len__(self) -> int:
        raise NotImplementedError


def facts_of(record: list[Any] | None) -> SourceFacts | None:
    """The facts of a source, from its record in a segment; None for a source that was removed."""
    return None if record is None else SourceFacts(record[0], record[1], record[2])
