"""The fold: what the commits of a store come to, one after the other. Belongs to one thread at a time; views of it do not."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from agentmesh.rag.store.columns import Mask
from agentmesh.rag.store.memtable import Memtable
from agentmesh.rag.store.segment import Segment, hashes
from agentmesh.rag.store.snapshot import Snapshot, SnapshotPart

SMALL_ROWS = 1024  # segments with fewer rows are kept in memory, side by side
IN_DELTA = -1

Place = tuple[int, int]  # (block or IN_DELTA, row)


@dataclass(frozen=True, slots=True)
class Commit:
    """What a commit came to; `again` when its key had been there before."""

    version: int
    added: int
    removed: int
    again: bool = False
    refused: tuple[str, ...] = ()  # sources that were not as expected, and are as they were


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """What is known of a source: its content's digest, its chunks, and what the writer added."""

    digest: str
    chunks: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Pending:
    """A source of which some parts are there; nothing of it is seen before all are."""

    digest: str
    of: int
    parts: dict[int, list[Place]] = field(default_factory=dict)


class SegmentState:
    """A large segment, and which of its rows are to be seen."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.alive: Mask = np.ones(segment.n, bool) if segment.parts is None else segment.parts == 0
        self.part: SnapshotPart | None = None  # as the last view has it; made anew when `alive` changes

    def set(self, row: int, alive: bool) -> None:
        """Changes one row, in a copy if a view looks at it."""
        if self.part is not None:
            self.alive, self.part = self.alive.copy(), None
        self.alive[row] = alive


def key_hash(key: str) -> bytes:
    """A key as it is kept; its last byte is never 0, which numpy would cut off."""
    return blake2b(key.encode(), digest_size=15).digest() + b"k"


class State:
    """Everything that is in a store at one version."""

    def __init__(self, d: int) -> None:
        self.d, self.version = d, 0
        self.blocks: list[SegmentState] = []
        self.delta = Memtable(d)
        self._alive: Mask = np.zeros(256, bool)
        self.segments: list[Segment] = []
        self.damaged: dict[str, str] = {}
        self.pending: dict[str, Pending] = {}
        self.facts: dict[str, SourceFacts | None] = {}
        self.keys: dict[bytes, Commit] = {}
        self._merged: list[Segment] = []  # their facts and keys are looked up where they lie

    def apply(self, segment: Segment) -> Commit:
        """The next segment, in the order of the chain."""
        removed = self._kill(self._find(segment.effects.get("removed_ids", [])))
        if segment.kind == "merged":
            self._apply_merged(segment)
            done = Commit(segment.b, segment.n, removed)
        else:
            removed += self._apply_commit(segment)
            refused = tuple(segment.effects.get("refused", ()))
            done = Commit(segment.b, segment.n, removed, refused=refused)
            if key := segment.header.get("key"):
                self.keys[key_hash(key)] = done
        self.segments.append(segment)
        self.version = segment.b
        return done

    def skip(self, version: int, file: str, problem: str) -> None:
        """A segment that cannot be read: the rest goes on without it."""
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
        for source, found in segment.sources.items():
            if found is not None and found[4] > 1:
                staged[source] = found
                continue
            removed += self._kill(self.rows_of(source))
            self.pending.pop(source, None)
            self.facts[source] = facts_of(found)
        seen = [segment.id(r) for r in range(segment.n) if segment.parts is None or not segment.parts[r]]
        removed += self._kill(self._find(seen))
        places = self._add(segment)
        for source, found in staged.items():
            removed += self._stage(source, found, [places[r] for r in segment.rows_of(source)])
        return removed

    def _stage(self, source: str, found: list[Any], places: list[Place]) -> int:
        digest, _, facts, part, of = found
        pending = self.pending.get(source)
        if pending is None or (pending.digest, pending.of) != (digest, of):
            pending = self.pending[source] = Pending(digest, of)
        pending.parts[part] = places
        if len(pending.parts) < of:
            return 0
        del self.pending[source]
        whole = [place for number in sorted(pending.parts) for place in pending.parts[number]]
        removed = self._kill(self.rows_of(source)) + self._kill(self._find([self.id(p) for p in whole]))
        for place in whole:
            self._set(place, True)
        self.facts[source] = SourceFacts(digest, len(whole), facts)
        return removed

    def _add(self, segment: Segment) -> Sequence[Place]:
        if segment.n >= SMALL_ROWS or segment.kind == "merged":
            self.blocks.append(SegmentState(segment))
            return _RowPlaces(len(self.blocks) - 1, 0)
        rows = self.delta.append(segment)
        while self.delta.n > len(self._alive):
            self._alive = np.concatenate([self._alive, np.zeros_like(self._alive)])
        self._alive[rows.start : rows.stop] = True if segment.parts is None else segment.parts == 0
        return _RowPlaces(IN_DELTA, rows.start)

    def _find(self, ids: Sequence[str]) -> Iterator[Place]:
        if not ids:
            return
        hashed = hashes(ids)
        for b, block in enumerate(self.blocks):
            for _, row in block.segment.find(ids, hashed):
                yield b, row
        for id in ids:
            for row in self.delta.by_id.get(id, ()):
                yield IN_DELTA, row

    def find(self, ids: Sequence[str]) -> dict[str, Place]:
        """Where the rows of ids are that are to be seen."""
        return {self.id(place): place for place in self._find(ids) if self.alive(place)}

    def rows_of(self, source: str) -> Iterator[Place]:
        """All rows of a source, seen or not."""
        for b, block in enumerate(self.blocks):
            for row in block.segment.rows_of(source):
                yield b, int(row)
        for row in self.delta.by_source.get(source, ()):
            yield IN_DELTA, row

    def alive(self, place: Place) -> bool:
        """Whether a row is to be seen."""
        block, row = place
        return bool(self._alive[row] if block == IN_DELTA else self.blocks[block].alive[row])

    def delta_alive(self, first: int, n: int) -> Mask:
        """Which of some rows of the delta are to be seen."""
        return self._alive[first : first + n]

    def id(self, place: Place) -> str:
        """A row's id."""
        block, row = place
        return self.delta.id(row) if block == IN_DELTA else self.blocks[block].segment.id(row)

    def segment(self, place: Place) -> tuple[Segment, int]:
        """The segment that holds a row, and the row there."""
        block, row = place
        return self.delta.place(row) if block == IN_DELTA else (self.blocks[block].segment, row)

    def _set(self, place: Place, alive: bool) -> None:
        block, row = place
        if block == IN_DELTA:
            self._alive[row] = alive  # views have a copy of their own
        else:
            self.blocks[block].set(row, alive)

    def _kill(self, places: Iterable[Place]) -> int:
        killed = 0
        for place in places:
            if self.alive(place):
                self._set(place, False)
                killed += 1
        return killed

    def source(self, source: str) -> SourceFacts | None:
        """What is known of a source; None when the store has none of that name."""
        if source in self.facts:
            return self.facts[source]
        for segment in reversed(self._merged):
            if source in segment.sources:
                return facts_of(segment.sources[source])
        return None

    def sources(self) -> dict[str, SourceFacts]:
        """All sources."""
        found: dict[str, SourceFacts | None] = {}
        for segment in self._merged:
            found.update((s, facts_of(f)) for s, f in segment.sources.items())
        found.update(self.facts)
        return {source: facts for source, facts in found.items() if facts is not None}

    def commit_of(self, key: str) -> Commit | None:
        """The commit that a key came with."""
        hashed = key_hash(key)
        if hashed in self.keys:
            return self.keys[hashed]
        for segment in reversed(self._merged):
            known = segment.array("keys")
            at = int(np.searchsorted(known["key"], np.bytes_(hashed)))
            if at < len(known) and known["key"][at] == hashed:
                row = known[at]
                refused = tuple(segment.effects.get("refusals", {}).get(hashed.hex(), ()))
                return Commit(int(row["version"]), int(row["added"]), int(row["removed"]), refused=refused)
        return None

    def view(self) -> Snapshot:
        """What a search sees from now on, whatever is applied later."""
        parts = []
        for block in self.blocks:
            if block.part is None:
                block.part = SnapshotPart(block.segment, block.alive, block.segment.vectors)
            parts.append(block.part)
        n = self.delta.n
        delta = SnapshotPart(self.delta, self._alive[:n].copy(), self.delta.vectors(n))
        return Snapshot(self.version, tuple(parts), delta)


class _RowPlaces(Sequence[Place]):
    """Row r of a segment is (block, first + r)."""

    def __init__(self, block: int, first: int) -> None:
        self._block, self._first = block, first

    def __getitem__(self, row: Any) -> Any:
        return self._block, self._first + int(row)

    def __len__(self) -> int:
        raise NotImplementedError


def facts_of(found: list[Any] | None) -> SourceFacts | None:
    """Facts as a segment keeps them."""
    return None if found is None else SourceFacts(found[0], found[1], found[2])
