"""Merging: a contiguous run of commits becomes one file, by whoever gets the lock. Killed anywhere, nothing is lost.

The merged file says what the run did to everything before it: rows, removed ids, facts of sources, keys of steps.
Only a run that begins with the first commit forgets what was removed.
"""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.errors import StoreDamaged
from agentmesh.rag.store.columns import Array, merge
from agentmesh.rag.store.folder import Folder, Span, name_of, sync, writing
from agentmesh.rag.store.segment import KEYS, Segment, SegmentWriter
from agentmesh.rag.store.snapshot import Snapshot
from agentmesh.rag.store.state import IN_DELTA, SMALL_ROWS, State
from agentmesh.rag.store.vector_index import IVF_ROWS, Floats, build_ivf

TAIL_FILES, TAIL_ROWS = 256, 16_384  # a writer that sees this many small commits merges them
LIGHT_ROWS = 50_000  # what a writer merges by the way; larger runs are left to `compact`
GROWTH = 4  # an older file is taken in while it is at most this many times what was gathered
WASTE = 0.2  # or when this part of it is not seen any more
COPY_ROWS = 8192
TEXT_ROWS = 5000  # fewer are indexed in memory by whoever searches: half a second at most, and writers merge often

log = logging.getLogger("agentmesh.rag")

BuildText = Callable[[Path, Iterable[tuple[int, str]]], None]
Embed = Callable[[Sequence[str]], npt.ArrayLike]


@dataclass(frozen=True, slots=True)
class MergedRows:
    """The rows of one segment that go on, each with its part (0 for one that is to be seen)."""

    segment: Segment
    rows: Array
    parts: Array


@dataclass(frozen=True, slots=True)
class MergeRun:
    """What a merged file is to say."""

    span: Span
    pieces: list[MergedRows]
    removed_ids: list[str]  # of rows before it
    after: State
    segments: Sequence[Segment]
    dropped: frozenset[str] = frozenset()  # sources whose parts before it do not count any more
    gone: frozenset[str] = frozenset()  # sources before it that are not any more, if the segments do not say so
    d: int = 0  # the vectors' width, if it is another one from here on


def wants_merge(segments: Sequence[Segment]) -> bool:
    """Whether the small commits at the end are many enough for a writer to merge them."""
    small = _small_tail(segments)
    return len(small) >= TAIL_FILES or sum(s.n for s in small) >= TAIL_ROWS


def _small_tail(segments: Sequence[Segment]) -> list[Segment]:
    found: list[Segment] = []
    for segment in reversed(segments):
        if segment.kind != "commit" or segment.n >= SMALL_ROWS:
            break
        found.append(segment)
    return found


def merge_length(state: State, *, everything: bool, light: bool) -> int:
    """How many segments at the end of the chain are to become one; below 2 there is nothing to do."""
    segments = state.segments
    if everything:
        return len(segments) if len(segments) > 1 else 0
    count, rows = 0, 0
    for segment in reversed(segments):
        if light and count and rows + segment.n > LIGHT_ROWS:
            break
        small = segment.n < SMALL_ROWS and segment.kind == "commit"
        if not small and segment.n > GROWTH * max(rows, SMALL_ROWS) and (light or _dead_share(state, segment) < WASTE):
            break
        count, rows = count + 1, rows + segment.n
    return count if count > 1 else 0


def _dead_share(state: State, segment: Segment) -> float:
    for block in state.blocks:
        if block.segment is segment and segment.n:
            return 1 - np.count_nonzero(block.alive) / segment.n
    return 0.0


def merge_run(
    folder: Folder, d: int, metric: str, *, everything: bool = False, light: bool = False, build_text: BuildText | None = None
) -> Span | None:  # fmt: skip
    """Merges the end of the chain, for the holder of the lock; None when there is nothing to do.

    Raises:
        StoreDamaged: a file of the run cannot be trusted; nothing was changed.
    """
    segments = _open_segments(folder)
    state = State(d)
    for segment in segments:
        state.apply(segment)
    if not segments or segments[-1].kind == "seal":
        return None
    if not (count := merge_length(state, everything=everything, light=light)):
        return None
    before, run = _state_before(segments, len(segments) - count, d)
    for segment in run:
        if problem := next(segment.problems(), None):
            raise StoreDamaged(f"{problem}", hint="it was not merged", path=str(folder.path), file=segment.path.name)
    view = before.view()
    for segment in run:
        before.apply(segment)
    span = (run[0].a, run[-1].b)
    write_run(folder, run_of(span, view, before, run), metric, build_text=build_text)
    return span


def _state_before(segments: list[Segment], first: int, d: int) -> tuple[State, list[Segment]]:
    """The store before the run, and the run; one that begins inside a source's parts begins with them instead."""
    while True:
        state = State(d)
        for segment in segments[:first]:
            state.apply(segment)
        if not state.pending:
            return state, segments[first:]
        first -= 1


def _open_segments(folder: Folder) -> list[Segment]:
    found, missing = folder.whole()
    if missing:
        raise StoreDamaged(
            f"{name_of(missing[0])} of {folder.path} is missing", hint="nothing was merged", file=name_of(missing[0])
        )
    return [Segment.open(folder.file(span), *span) for span in found]


def run_of(span: Span, before: Snapshot, after: State, run: Sequence[Segment]) -> MergeRun:
    """What some segments at the end of a chain come to.

    Args:
        before: the store as it was when they began.
        after: as it is at their end.
    """
    removed = list(_removed(before, after)) if span[0] > 1 else []
    return MergeRun(span, pieces_of(after, run), removed, after, run)


def write_run(
    folder: Folder, run: MergeRun, metric: str, *, build_text: BuildText | None = None, embed: Embed | None = None
) -> bool:
    """Writes and publishes a merged file; False if somebody has published it already. `embed` makes the vectors anew."""
    n = sum(len(p.rows) for p in run.pieces)
    d = run.d or run.after.d
    with writing(folder.path):
        with folder.temporary() as (temporary, file):
            writer = SegmentWriter(file)
            _rows(writer, run.pieces, embed)
            writer.array("keys", [_merged_keys(run)], KEYS)
            writer.json("sources", _merged_sources(run))
            writer.json("effects", {name: value for name, value in _effects(run).items() if value})
            writer.finish({"kind": "merged", "n": n, "d": d, "metric": metric})
        try:
            _write_indexes(folder, temporary, run.span, n, metric, build_text)
            published = folder.publish(temporary, run.span)
        finally:
            temporary.unlink(missing_ok=True)
        sync(folder.path)
    return published


def _effects(run: MergeRun) -> dict[str, Any]:
    refusals = {k.hex(): c.refused for k, c in run.after.keys.items() if c.refused and c.version >= run.span[0]}
    for segment in run.segments:
        refusals.update(segment.effects.get("refusals", {}))
    pending = {s: [p.digest, p.of, sorted(p.parts)] for s, p in run.after.pending.items()}
    return {"removed_ids": run.removed_ids, "pending": pending, "dropped": sorted(run.dropped), "refusals": refusals}


def _write_indexes(
    folder: Folder, temporary: Path, span: Span, n: int, metric: str, build_text: BuildText | None
) -> None:
    """The indexes of a merged file are in their places before it is. They can be done without: it is searched exactly."""
    segment, target = Segment.open(temporary, *span), folder.file(span)
    index, words = temporary.with_suffix(".ivf"), temporary.with_suffix(".text")
    try:
        if n >= IVF_ROWS and build_ivf(index, segment.vectors, metric):
            index.replace(target.with_suffix(".ivf"))
        if build_text is not None and n >= TEXT_ROWS:
            build_text(words, ((row, segment.text(row)) for row in range(n)))
            shutil.rmtree(target.with_suffix(".text"), ignore_errors=True)
            words.rename(target.with_suffix(".text"))
    except (OSError, RuntimeError, ValueError) as e:  # as FAISS and tantivy say that the disk is full
        log.warning("no index beside %s: %s", target, str(e).splitlines()[0])
    finally:
        index.unlink(missing_ok=True)
        shutil.rmtree(words, ignore_errors=True)


def pieces_of(after: State, run: Sequence[Segment]) -> list[MergedRows]:
    """The rows of some segments that go on: those to be seen, and those that wait for their source to be whole."""
    alive = {id(block.segment): block.alive for block in after.blocks}
    staged: dict[int, dict[int, int]] = {}
    for pending in after.pending.values():
        for part, places in pending.parts.items():
            for place in places:
                segment, row = after.segment(place)
                staged.setdefault(id(segment), {})[row] = part
    out, at = [], {id(s): first for first, s in after.delta.placed()}
    for segment in run:
        if not segment.n:
            continue
        parts = np.full(segment.n, -1, np.int32)
        mask = alive[id(segment)] if id(segment) in alive else after.delta_alive(at[id(segment)], segment.n)
        parts[mask] = 0
        for row, part in staged.get(id(segment), {}).items():
            parts[row] = part
        rows = np.flatnonzero(parts >= 0)
        out.append(MergedRows(segment, rows, parts[rows]))
    return out


def _rows(writer: SegmentWriter, pieces: Sequence[MergedRows], embed: Embed | None) -> None:
    writer.array("vectors", _vectors(pieces, embed), np.float32)
    hashed = [_hashes(p.segment)[p.rows] for p in pieces]
    together = np.concatenate(hashed) if hashed else np.zeros(0, np.uint64)
    order = np.argsort(together, kind="stable")
    writer.array("hashes", [together[order]], np.uint64)
    writer.array("hashes.rows", [order], np.uint32)
    for name in ("ids", "texts"):
        ends = [p.segment.array(f"{name}.ends") for p in pieces]
        lengths = [np.diff(e, prepend=0)[p.rows] for e, p in zip(ends, pieces, strict=True)]
        total = np.cumsum(np.concatenate(lengths)) if lengths else np.zeros(0, np.int64)
        writer.words(name, total, (w for p in pieces for w in _text_rows(p, name)))
    writer.array("starts", [p.segment.array("starts")[p.rows] for p in pieces], np.int64)
    writer.array("births", [p.segment.births[p.rows] for p in pieces], np.int64)
    if any(p.parts.any() for p in pieces):
        writer.array("parts", [p.parts for p in pieces], np.int32)
    writer.columns(merge([(p.segment.columns, p.rows) for p in pieces]))


def _vectors(pieces: Sequence[MergedRows], embed: Embed | None) -> Iterator[Floats]:
    for piece in pieces:
        for first in range(0, len(piece.rows), COPY_ROWS):
            rows = piece.rows[first : first + COPY_ROWS]
            if embed is None:
                yield piece.segment.vectors[rows]
            else:
                yield np.asarray(embed([piece.segment.text(int(r)) for r in rows]), np.float32)


def _hashes(segment: Segment) -> Array:
    found = np.empty(segment.n, np.uint64)
    found[segment.array("hashes.rows")] = segment.array("hashes")
    return found


def _text_rows(piece: MergedRows, name: str) -> Iterator[bytes]:
    segment, rows = piece.segment, piece.rows
    if len(rows) == segment.n:
        yield segment.bytes(name)
        return
    ends = segment.array(f"{name}.ends")
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    for first in range(0, len(rows), COPY_ROWS):
        some = rows[first : first + COPY_ROWS]
        yield b"".join(segment.bytes(name, int(a), int(b)) for a, b in zip(starts[some], ends[some], strict=True))


def _merged_keys(run: MergeRun) -> Array:
    known = [s.array("keys") for s in run.segments if s.kind == "merged"]
    rows = [(k, c.version, c.added, c.removed) for k, c in run.after.keys.items() if c.version >= run.span[0]]
    return np.sort(np.concatenate([*known, np.array(rows, KEYS)]), order="key")


def _merged_sources(run: MergeRun) -> dict[str, Any]:
    out: dict[str, Any] = dict.fromkeys(run.gone)
    for source in dict.fromkeys(name for segment in run.segments for name in segment.sources):
        facts = run.after.source(source)
        if facts is not None:
            out[source] = [facts.digest, facts.chunks, dict(facts.facts)]
        elif run.span[0] > 1:
            out[source] = None
    return out


def _removed(before: Snapshot, after: State) -> Iterator[str]:
    """Ids of rows before the run that it ended."""
    for part, block in zip(before.blocks, after.blocks, strict=False):
        for row in np.flatnonzero(part.alive & ~block.alive):
            yield block.segment.id(int(row))
    n = before.delta.n
    for row in np.flatnonzero(before.delta.alive & ~after.delta_alive(0, n)):
        yield after.id((IN_DELTA, int(row)))
