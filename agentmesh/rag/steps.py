"""The steps of an ingest as tools: plan, check, parse, remove, tidy; embed and index are in `indexing`.

Texts and vectors go from step to step in parts; each step may be done again, by any worker that sees the folders.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmesh.errors import DocumentError, MeshError
from agentmesh.rag import loaders, plan
from agentmesh.rag.chunk import Chunk
from agentmesh.rag.here import embedder_for, store_of
from agentmesh.rag.listing import Listing, list_documents, matcher
from agentmesh.rag.parts import Parts, chunks_to_json, sweep, typed
from agentmesh.rag.plan import Asked, Facts, How, Todo
from agentmesh.rag.reports import Batch, Failure, Parsed, Planned, blamed
from agentmesh.rag.split import split
from agentmesh.step import ToolContext
from agentmesh.tool import tool

BATCH_CHUNKS = 2048  # chunks that are embedded and committed together
PLAN_BYTES = 64 << 20
NOBODY = ToolContext()


@dataclass(frozen=True, slots=True)
class Look:
    """What an ingest finds before it does anything.

    Args:
        gone: sources that vanished, each with its digest in the store; with `sync` alone.
        failed: what could not be listed.
        refused: why nothing is to be done.
    """

    listing: Listing
    known: Mapping[str, Facts]
    gone: dict[str, str]
    failed: list[Failure]
    refused: str = ""


def look(store: str, asked: Asked) -> Look:
    """List the documents and what the store has."""
    wanted = matcher(asked.glob) if asked.glob else loaders.knows
    listing = list_documents(asked.paths, wanted=wanted, label=asked.label, without=[store])
    known = store_of(store).sources()
    failed = [Failure(source=s, why=w) for s, w in sorted(listing.unread.items())]
    refused = plan.other_root(list(listing.found.values()), known, os.path.isdir)
    gone = plan.vanished(listing, known, wanted) if asked.sync else {}
    if gone and not asked.force:
        refused = refused or plan.too_much(listing, known, gone)
    if not listing.found and not failed and not gone:
        refused = refused or (
            f"there is no document in {', '.join(asked.paths)} "
            + (f"that fits {asked.glob!r}" if asked.glob else "that a loader knows: name its files, or give a glob")
        )
    return Look(listing, known, gone, failed, refused)


def nothing_to_do(store: str, asked: Asked, how: How) -> Planned | None:
    """The plan of an ingest that has nothing to do, as the store has every document as it is; None where it may have."""
    try:
        found = look(store, asked)
        if found.refused or found.gone or any(plan.todo(found.listing, found.known, how.mark())):
            return None
    except MeshError:  # the run's to tell
        return None
    sweep(store)
    return Planned(skipped=len(found.listing.found), failed=found.failed)


@tool(queue="index", max_output_bytes=PLAN_BYTES)
def plan_ingest(store: str, asked: Asked, how: How, c: ToolContext = NOBODY) -> Planned:
    """List the documents, skip what the store has, and cut the rest into packs."""
    if missing := next((p for p in asked.paths if not os.path.exists(p)), ""):
        return Planned(refused=f"there is no folder or file {missing!r} here; name one that the workers see")
    sweep(store)
    found = look(store, asked)
    if found.refused:
        return Planned(refused=found.refused)
    parts = Parts(store, c.key)
    new = list(plan.todo(found.listing, found.known, how.mark()))
    names = [parts.put_json([one.model_dump() for one in pack]) for pack in plan.packs(new)]
    return Planned(
        parts=c.key, packs=names, documents=len(new), bytes=sum(one.size for one in new),
        skipped=len(found.listing.found) - len(new), failed=found.failed,
        vanished=parts.put_json(found.gone) if found.gone else "",
    )  # fmt: skip


@tool(queue="embed")
def check_embedder(store: str, embedder: str) -> str:
    """Why this embedder cannot be used with the store; "" where it can."""
    try:
        store_of(store, embedder_for(store, embedder).identity).version  # noqa: B018  # reading the store compares the two
    except MeshError as e:
        return e.message
    return ""


@tool(queue="parse", retries=2)
def parse_pack(store: str, parts: str, pack: str, how: How) -> Parsed:
    """Read the documents of a pack and cut them into chunks; one that cannot be read is a value, not an error."""
    kept = Parts(store, parts)
    todos = [Todo(**one) for one in kept.get_json(pack)]
    failed: list[Failure] = []
    rows: list[tuple[dict[str, Any], list[Chunk]]] = []
    for one in todos:
        try:
            digest, chunks = _read(one, how)
        except (MeshError, OSError) as e:
            failed.append(Failure(source=one.source, why=_said(e)))
            continue
        if digest == one.expects:
            continue  # what changed after the planning has changed back
        facts = {"size": one.size, "mtime_ns": one.mtime_ns, "how": how.mark(), "root": one.root}
        n = max(1, -(-len(chunks) // BATCH_CHUNKS))
        for i in range(n):
            head = {"source": one.source, "digest": digest, "expects": one.expects, "facts": facts, "part": [i + 1, n]}
            rows.append((head, chunks[i * BATCH_CHUNKS : (i + 1) * BATCH_CHUNKS]))
    batches = [_batch(kept, some) for some in _batched(rows)]
    return Parsed(batches=batches, bytes=sum(one.size for one in todos), failed=failed)


def _read(one: Todo, how: How) -> tuple[str, list[Chunk]]:
    """The digest of what is on disk now, and its chunks.

    Raises:
        OSError, DocumentError: it cannot be read.
    """
    if one.size > loaders.LARGEST_BYTES:
        raise DocumentError(
            f"it has {one.size / 2**20:.0f} MiB, more than the {loaders.LARGEST_BYTES / 2**20:.0f} MiB that are read at once; split it"
        )
    with open(one.path, "rb") as file:
        data = file.read()
    document = loaders.parse(data, os.path.basename(one.path), encoding=how.encoding)
    chunks = split(document, one.source, size=how.size, overlap=how.overlap, metadata=typed(how.metadata))
    return plan.content_digest(data, how.mark()), chunks


def _batched(rows: Sequence[tuple[dict[str, Any], list[Chunk]]]) -> list[list[tuple[dict[str, Any], list[Chunk]]]]:
    found: list[list[tuple[dict[str, Any], list[Chunk]]]] = []
    used = BATCH_CHUNKS
    for head, chunks in rows:
        if not found or used + len(chunks) > BATCH_CHUNKS:
            found.append([])
            used = 0
        found[-1].append((head, chunks))
        used += len(chunks)
    return found


def _batch(kept: Parts, rows: Sequence[tuple[dict[str, Any], list[Chunk]]]) -> Batch:
    part = kept.put_json([{**head, "chunks": chunks_to_json(chunks)} for head, chunks in rows])
    return Batch(part=part, chunks=sum(len(chunks) for _, chunks in rows))


@tool(queue="index")
def blame(store: str, parts: str, part: str, why: str) -> list[Failure]:
    """The documents of a pack or batch whose step failed for good."""
    return blamed(Parts(store, parts).get_json(part), why)


@tool(queue="index", retries=5)
def remove_vanished(store: str, parts: str, vanished: str, c: ToolContext = NOBODY) -> int:
    """Take vanished documents out of the store, but for those that somebody changed meanwhile; how many."""
    sources: dict[str, str] = Parts(store, parts).get_json(vanished)
    commit = store_of(store).remove(list(sources), expects=sources, key=f"{c.key} {vanished}")
    return len(sources) - len(commit.refused)


@tool(queue="index")
def compact(store: str) -> bool:
    """Merge large files where it pays; whether it did. A search index of a million passages takes minutes."""
    kept = store_of(store)
    return kept.stats().wants_compaction and kept.compact()


@tool(queue="index")
def tidy(store: str, parts: str) -> None:
    """The run has ended: its parts go."""
    Parts(store, parts).remove()


def _said(error: Exception) -> str:
    if isinstance(error, MeshError):
        return error.message
    return f"the file cannot be read ({getattr(error, 'strerror', '') or error})"
