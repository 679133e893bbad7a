"""Compaction: consecutive segments are merged into one file, by the process that holds the lock. A crash loses nothing.

The merged segment says what its commits did to the segments before it: rows, removed ids, facts of sources, keys of
steps. Only one that begins with the first commit can drop what was removed.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.errors import StoreDamaged
from agentmesh.rag.store.columns import Array, merge_columns
from agentmesh.rag.store.folder import Folder, Span, disk_errors, name_of, sync
from agentmesh.rag.store.segment import KEY_DTYPE, Segment, SegmentWriter
from agentmesh.rag.store.snapshot import Snapshot
from agentmesh.rag.store.state import IN_MEMTABLE, SMALL_ROWS, State
from agentmesh.rag.store.vector_index import IVF_ROWS, Floats, build_ivf

TAIL_MERGE_FILES, TAIL_MERGE_ROWS = 256, 16_384  # a writer merges the small segments at the end when they are so many
WRITER_MERGE_ROWS = 50_000  # the most that a writer merges after a commit; the rest is left to `compact`
SIZE_RATIO = 4  # size-tiered: an older segment is merged too while it has at most this many times the rows gathered
DEAD_SHARE = 0.2  # or when this share of its rows is dead
COPY_ROWS = 8192  # rows that are copied at once
TEXT_INDEX_ROWS = 5000  # fewer are indexed in memory by each searching process, in half a second at most

log = logging.getLogger("agentmesh.rag")

RESTORE = "put the file back from a copy, or ingest its documents again"

BuildText = Callable[[Path, Iterable[tuple[int, str]]], None]
Embed = Callable[[Sequence[str]], npt.ArrayLike]


@dataclass(frozen=True, slots=True)
class LiveRows:
    """The rows of one segment that a merge copies, each with its part: 0 for a visible one.

    Args:
        rows: int64 (n,).
        parts: int32 (n,).
    """

    segment: Segment
    rows: Array
    parts: Array


@dataclass(frozen=True, slots=True)
class Merge:
    """The content of a merged segment.

    Args:
        removed_ids: of rows before it that its commits removed.
        after: the state at its end.
        segments: what it replaces.
        dropped: sources whose earlier parts do not count any more.
        vanished: sources before it that no longer exist, where the segments do not say so.
        d: the vectors' width; 0 for the one of `after`.
    """

    span: Span
    live: list[LiveRows]
    removed_ids: list[str]
    after: State
    segments: Sequence[Segment]
    dropped: frozenset[str] = frozenset()
    vanished: frozenset[str] = frozenset()
    d: int = 0


def wants_merge(segments: Sequence[Segment]) -> bool:
    """Whether a writer should merge the small segments at the end of the chain."""
    small = list(takewhile(_is_small, reversed(segments)))
    return len(small) >= TAIL_MERGE_FILES or sum(s.n for s in small) >= TAIL_MERGE_ROWS


def _is_small(segment: Segment) -> bool:
    return segment.kind == "commit" and segment.n < SMALL_ROWS


def merge_length(state: State, *, everything: bool, by_writer: bool) -> int:
    """How many segments at the end of the chain to merge; 0 when there is nothing to merge."""
    segments = state.segments
    if everything:
        return len(segments) if len(segments) > 1 else 0
    count, rows = 0, 0
    for segment in reversed(segments):
        if by_writer and count and rows + segment.n > WRITER_MERGE_ROWS:
            break
        too_large = not _is_small(segment) and segment.n > SIZE_RATIO * max(rows, SMALL_ROWS)
        if too_large and (by_writer or _dead_share(state, segment) < DEAD_SHARE):
            break
        count, rows = count + 1, rows + segment.n
    return count if count > 1 else 0


def _dead_share(state: State, segment: Segment) -> float:
    for large in state.large_segments:
        if large.segment is segment and segment.n:
            return 1 - np.count_nonzero(large.alive) / segment.n
    return 0.0


def merge_segments(
    folder: Folder, d: int, metric: str, *, everything: bool = False, by_writer: bool = False,
    build_text: BuildText | None = None,
) -> Span | None:  # fmt: skip
    """Merge segments at the end of the chain; None when there is nothing to merge. The caller holds `merge_lock`.

    Raises:
        StoreDamaged: one of the segments is damaged; nothing was changed.
    """
    segments = _open_segments(folder)
    state = State(d)
    for segment in segments:
        state.apply(segment)
    if not segments or segments[-1].kind == "seal":
        return None
    if not (count := merge_length(state, everything=everything, by_writer=by_writer)):
        return None
    state, tail = _state_before(segments, len(segments) - count, d)
    for segment in tail:
        if problem := next(segment.problems(), None):
            raise StoreDamaged(
                f"nothing was merged: {problem}", hint=RESTORE, path=str(folder.path), file=segment.path.name
            )
    before = state.snapshot()
    for segment in tail:
        state.apply(segment)
    span = (tail[0].a, tail[-1].b)
    write_merged(folder, merge_of(span, before, state, tail), metric, build_text=build_text)
    return span


def _state_before(segments: list[Segment], first: int, d: int) -> tuple[State, list[Segment]]:
    """The state before a merge, and the segments to merge: earlier ones too while a source's parts would be divided."""
    while True:
        state = State(d)
        for segment in segments[:first]:
            state.apply(segment)
        if not state.pending:
            return state, segments[first:]
        first -= 1


def _open_segments(folder: Folder) -> list[Segment]:
    links, gaps = folder.chain_and_gaps()
    if gaps:
        name = name_of(gaps[0])
        raise StoreDamaged(
            f"nothing was merged: {name} of {folder.path} is missing", hint=RESTORE, path=str(folder.path), file=name
        )
    return [Segment.open(folder.file(span), *span) for span in links]


def merge_of(span: Span, before: Snapshot, after: State, segments: Sequence[Segment]) -> Merge:
    """The merge of some segments at the end of a chain, given the store before and after them."""
    removed = list(_removed(before, after)) if span[0] > 1 else []
    return Merge(span, live_rows(after, segments), removed, after, segments)


def write_merged(
    folder: Folder, merge: Merge, metric: str, *, build_text: BuildText | None = None, embed: Embed | None = None
) -> bool:
    """Write and publish a merged segment; False if its number is taken.

    Args:
        embed: makes new vectors from the texts; without it the vectors are copied.
    """
    n = sum(len(p.rows) for p in merge.live)
    d = merge.d or merge.after.d
    with disk_errors(folder.path):
        with folder.temporary() as (temporary, file):
            writer = SegmentWriter(file)
            _write_rows(writer, merge.live, embed)
            writer.array("keys", [_merged_keys(merge)], KEY_DTYPE)
            writer.json("sources", _merged_sources(merge))
            writer.json("effects", {name: value for name, value in _effects(merge).items() if value})
            writer.finish({"kind": "merged", "n": n, "d": d, "metric": metric})
        try:
            _write_indexes(folder, temporary, merge.span, n, metric, build_text)
            published = folder.publish(temporary, merge.span)
        finally:
            temporary.unlink(missing_ok=True)
        sync(folder.path)
    return published


def _effects(merge: Merge) -> dict[str, Any]:
    first = merge.span[0]
    refusals = {k.hex(): c.refused for k, c in merge.after.keys.items() if c.refused and c.version >= first}
    for segment in merge.segments:
        refusals.update(segment.effects.get("refusals", {}))
    pending = {s: [p.digest, p.of, sorted(p.parts)] for s, p in merge.after.pending.items()}
    return {
        "removed_ids": merge.removed_ids,
        "pending": pending,
        "dropped": sorted(merge.dropped),
        "refusals": refusals,
    }


def _write_indexes(
    folder: Folder, temporary: Path, span: Span, n: int, metric: str, build_text: BuildText | None
) -> None:
    """Write the indexes of a merged segment before it is published. They are optional: search is exact without them."""
    segment, target = Segment.open(temporary, *span), folder.file(span)
    index, text_index = temporary.with_suffix(".ivf"), temporary.with_suffix(".text")
    try:
        if n >= IVF_ROWS and build_ivf(index, segment.vectors, metric):
            index.replace(target.with_suffix(".ivf"))
        if build_text is not None and n >= TEXT_INDEX_ROWS:
            build_text(text_index, ((row, segment.text(row)) for row in range(n)))
            shutil.rmtree(target.with_suffix(".text"), ignore_errors=True)
            text_index.rename(target.with_suffix(".text"))
    except (OSError, RuntimeError, ValueError) as e:  # FAISS and tantivy raise these when the disk is full
        log.warning("%s has no index: %s", target, str(e).splitlines()[0])
    finally:
        index.unlink(missing_ok=True)
        shutil.rmtree(text_index, ignore_errors=True)


def live_rows(after: State, segments: Sequence[Segment]) -> list[LiveRows]:
    """The rows of some segments that are alive, or hidden until all parts of their source are committed."""
    alive = {id(large.segment): large.alive for large in after.large_segments}
    staged: dict[int, dict[int, int]] = {}  # by segment: row -> part
    for pending in after.pending.values():
        for part, places in pending.parts.items():
            for place in places:
                segment, row = after.segment(place)
                staged.setdefault(id(segment), {})[row] = part
    live, first_row = [], {id(s): first for first, s in after.memtable.placed()}
    for segment in segments:
        if not segment.n:
            continue
        parts = np.full(segment.n, -1, np.int32)
        mask = alive[id(segment)] if id(segment) in alive else after.memtable_alive(first_row[id(segment)], segment.n)
        parts[mask] = 0
        for row, part in staged.get(id(segment), {}).items():
            parts[row] = part
        rows = np.flatnonzero(parts >= 0)
        live.append(LiveRows(segment, rows, parts[rows]))
    return live


def _write_rows(writer: SegmentWriter, live: Sequence[LiveRows], embed: Embed | None) -> None:
    writer.array("vectors", _vectors(live, embed), np.float32)
    hash_lists = [p.segment.hashes_by_row()[p.rows] for p in live]
    hashed = np.concatenate(hash_lists) if hash_lists else np.zeros(0, np.uint64)
    order = np.argsort(hashed, kind="stable")
    writer.array("hashes", [hashed[order]], np.uint64)
    writer.array("hashes.rows", [order], np.uint32)
    for name in ("ids", "texts"):
        ends = [p.segment.array(f"{name}.ends") for p in live]
        lengths = [np.diff(e, prepend=0)[p.rows] for e, p in zip(ends, live, strict=True)]
        merged_ends = np.cumsum(np.concatenate(lengths)) if lengths else np.zeros(0, np.int64)
        writer.words(name, merged_ends, (w for p in live for w in _words(p, name)))
    writer.array("starts", [p.segment.array("starts")[p.rows] for p in live], np.int64)
    writer.array("births", [p.segment.row_versions[p.rows] for p in live], np.int64)
    if any(p.parts.any() for p in live):
        writer.array("parts", [p.parts for p in live], np.int32)
    writer.columns(merge_columns([(p.segment.columns, p.rows) for p in live]))


def _vectors(live: Sequence[LiveRows], embed: Embed | None) -> Iterator[Floats]:
    for piece in live:
        for first in range(0, len(piece.rows), COPY_ROWS):
            rows = piece.rows[first : first + COPY_ROWS]
            if embed is None:
                yield piece.segment.vectors[rows]
            else:
                yield np.asarray(embed([piece.segment.text(int(r)) for r in rows]), np.float32)


def _words(piece: LiveRows, name: str) -> Iterator[bytes]:
    """The ids or texts of rows, as the bytes of a section of texts."""
    segment, rows = piece.segment, piece.rows
    if len(rows) == segment.n:
        yield segment.bytes(name)
        return
    ends = segment.array(f"{name}.ends")
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    for first in range(0, len(rows), COPY_ROWS):
        some = rows[first : first + COPY_ROWS]
        yield b"".join(segment.bytes(name, int(a), int(b)) for a, b in zip(starts[some], ends[some], strict=True))


def _merged_keys(merge: Merge) -> Array:
    merged_before = [s.array("keys") for s in merge.segments if s.kind == "merged"]
    rows = [(k, c.version, c.added, c.removed) for k, c in merge.after.keys.items() if c.version >= merge.span[0]]
    return np.sort(np.concatenate([*merged_before, np.array(rows, KEY_DTYPE)]), order="key")


def _merged_sources(merge: Merge) -> dict[str, Any]:
    records: dict[str, Any] = dict.fromkeys(merge.vanished)
    for source in dict.fromkeys(name for segment in merge.segments for name in segment.sources):
        facts = merge.after.source(source)
        if facts is not None:
            records[source] = [facts.digest, facts.chunks, dict(facts.facts)]
        elif merge.span[0] > 1:
            records[source] = None
    return records


def _removed(before: Snapshot, after: State) -> Iterator[str]:
    """The ids of rows that were alive before and are dead after."""
    for part, large in zip(before.large_segments, after.large_segments, strict=False):
        for row in np.flatnonzero(part.alive & ~large.alive):
            yield large.segment.id(int(row))
    n = before.memtable.n
    for row in np.flatnonzero(before.memtable.alive & ~after.memtable_alive(0, n)):
        yield after.id((IN_MEMTABLE, int(row)))
