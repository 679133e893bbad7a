"""The steps of an ingest as tools: plan, check, parse, remove, tidy; embed and index are in `indexing`.

Texts and vectors go from step to step in parts; each step may be done again, by any worker that sees the folders.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentmesh.definitions.step import ToolContext
from agentmesh.definitions.tool import tool
from agentmesh.errors import DocumentError, EmbedderError, MeshError, StoreDamaged, StoreError, StoreFull
from agentmesh.model import RetryLater
from agentmesh.rag import loaders
from agentmesh.rag.documents import Chunk
from agentmesh.rag.embedders.base import Embedder, Identity
from agentmesh.rag.embedders.batcher import EmbeddingBatcher, Vectors
from agentmesh.rag.ingestion import plan
from agentmesh.rag.ingestion.plan import (
    ChunkOptions,
    IngestRequest,
    KnownSource,
    Listing,
    PendingDocument,
    list_documents,
    matcher,
)
from agentmesh.rag.ingestion.scratch import (
    Batch,
    Embedded,
    Failure,
    Indexed,
    Parsed,
    Planned,
    ScratchFiles,
    all_failed,
    chunks_from_json,
    chunks_to_json,
    metadata_from_json,
    remove_abandoned,
)
from agentmesh.rag.process_cache import batcher_for, embedder_for, store_of
from agentmesh.rag.splitter import split
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.writer import Replacement

BATCH_CHUNKS = 2048  # chunks that are embedded and committed together
PLAN_BYTES = 64 << 20
NOBODY = ToolContext()


@dataclass(frozen=True, slots=True)
class IngestPreview:
    """What an ingest finds before it does anything.

    Args:
        gone: sources that vanished, each with its digest in the store; with `sync` alone.
        failed: what could not be listed.
        refused: why nothing is to be done.
    """

    listing: Listing
    known: Mapping[str, KnownSource]
    gone: dict[str, str]
    failed: list[Failure]
    refused: str = ""


def preview(store: str, asked: IngestRequest) -> IngestPreview:
    """List the documents and what the store has."""
    wanted = matcher(asked.glob) if asked.glob else loaders.knows
    listing = list_documents(asked.paths, wanted=wanted, label=asked.label, without=[store])
    known = store_of(store).sources()
    failed = [Failure(source=s, why=w) for s, w in sorted(listing.unread.items())]
    refused = plan.label_conflict(list(listing.found.values()), known, os.path.isdir)
    gone = plan.vanished(listing, known, wanted) if asked.sync else {}
    if gone and not asked.force:
        refused = refused or plan.why_not_remove(listing, known, gone)
    if not listing.found and not failed and not gone:
        refused = refused or (
            f"there is no document in {', '.join(asked.paths)} "
            + (f"that fits {asked.glob!r}" if asked.glob else "that a loader knows: name its files, or give a glob")
        )
    return IngestPreview(listing, known, gone, failed, refused)


def nothing_to_do(store: str, asked: IngestRequest, how: ChunkOptions) -> Planned | None:
    """The plan of an ingest that has nothing to do, as the store has every document as it is; None where it may have."""
    try:
        found = preview(store, asked)
        if found.refused or found.gone or any(plan.pending_documents(found.listing, found.known, how.mark())):
            return None
    except MeshError:  # the run's to tell
        return None
    remove_abandoned(store)
    return Planned(skipped=len(found.listing.found), failed=found.failed)


@tool(queue="index", max_output_bytes=PLAN_BYTES)
def plan_ingest(store: str, asked: IngestRequest, how: ChunkOptions, c: ToolContext = NOBODY) -> Planned:
    """List the documents, skip what the store has, and cut the rest into packs."""
    if missing := next((p for p in asked.paths if not os.path.exists(p)), ""):
        return Planned(refused=f"there is no folder or file {missing!r} here; name one that the workers see")
    remove_abandoned(store)
    found = preview(store, asked)
    if found.refused:
        return Planned(refused=found.refused)
    parts = ScratchFiles(store, c.key)
    new = list(plan.pending_documents(found.listing, found.known, how.mark()))
    names = [parts.put_json([one.model_dump() for one in pack]) for pack in plan.split_into_packs(new)]
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
        return str(e)
    return ""


@tool(queue="parse", retries=2)
def parse_pack(store: str, parts: str, pack: str, how: ChunkOptions) -> Parsed:
    """Read the documents of a pack and cut them into chunks; one that cannot be read is a value, not an error."""
    kept = ScratchFiles(store, parts)
    todos = [PendingDocument(**one) for one in kept.get_json(pack)]
    failed: list[Failure] = []
    rows: list[tuple[dict[str, Any], list[Chunk]]] = []
    for one in todos:
        try:
            digest, chunks = _read(one, how)
        except (MeshError, OSError) as e:
            failed.append(Failure(source=one.source, why=_reason(e)))
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


def _read(one: PendingDocument, how: ChunkOptions) -> tuple[str, list[Chunk]]:
    """The digest of what is on disk now, and its chunks.

    Raises:
        OSError, DocumentError: it cannot be read.
    """
    if one.size > loaders.MAX_FILE_BYTES:
        raise DocumentError(
            f"it has {one.size / 2**20:.0f} MiB, more than the {loaders.MAX_FILE_BYTES / 2**20:.0f} MiB that are read at once",
            hint="split it",
        )
    with open(one.path, "rb") as file:
        data = file.read()
    document = loaders.parse(data, os.path.basename(one.path), encoding=how.encoding)
    chunks = split(document, one.source, size=how.size, overlap=how.overlap, metadata=metadata_from_json(how.metadata))
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


def _batch(kept: ScratchFiles, rows: Sequence[tuple[dict[str, Any], list[Chunk]]]) -> Batch:
    part = kept.put_json([{**head, "chunks": chunks_to_json(chunks)} for head, chunks in rows])
    return Batch(part=part, chunks=sum(len(chunks) for _, chunks in rows))


@tool(queue="index")
def failures_of(store: str, parts: str, part: str, why: str) -> list[Failure]:
    """The documents of a pack or batch whose step failed for good."""
    return all_failed(ScratchFiles(store, parts).get_json(part), why)


@tool(queue="index", retries=5)
def remove_vanished(store: str, parts: str, vanished: str, c: ToolContext = NOBODY) -> int:
    """Take vanished documents out of the store, but for those that somebody changed meanwhile; how many."""
    sources: dict[str, str] = ScratchFiles(store, parts).get_json(vanished)
    commit = store_of(store).remove(list(sources), expects=sources, key=f"{c.key} {vanished}")
    return len(sources) - len(commit.refused)


@tool(queue="index")
def compact(store: str) -> bool:
    """Merge large files where it pays; whether it did. A search index of a million passages takes minutes."""
    kept = store_of(store)
    return kept.stats().wants_compaction and kept.compact()


@tool(queue="index")
def clean_up(store: str, parts: str) -> None:
    """The run has ended: its parts go."""
    ScratchFiles(store, parts).remove()


def _reason(error: Exception) -> str:
    if isinstance(error, MeshError):
        return str(error)
    return f"the file cannot be read ({getattr(error, 'strerror', '') or error})"


# ---- The two last steps of an ingest as tools ---------------------------------------------------

CHANGED_MEANWHILE = "it was changed in the store by another writer in the meantime; add it again"


@tool(queue="embed", retries=5)
def embed_batch(store: str, parts: str, batch: str, embedder: str, c: ToolContext = NOBODY) -> Embedded:
    """The vectors of a batch; a document whose text the embedder refuses is left out and named."""
    kept = ScratchFiles(store, parts)
    documents = kept.get_json(batch)
    texts = [[row[1] for row in one["chunks"]] for one in documents]
    maker = embedder_for(store, embedder)
    by = batcher_for(maker)
    try:
        vectors = _embed_texts(by, [t for some in texts for t in some], c, sum(len(t) for t in texts))
        return _store_vectors(kept, vectors, maker)
    except MeshError as e:
        if len(documents) == 1:
            return _store_vectors(kept, np.zeros((0, 0), np.float32), maker, all_failed(documents, str(e)))
    failed: list[Failure] = []
    rows = []
    for one, some in zip(documents, texts, strict=True):
        try:
            rows += list(_embed_texts(by, some, c, len(some)))
        except MeshError as e:
            failed.append(Failure(source=one["source"], why=str(e)))
    return _store_vectors(kept, np.array(rows, np.float32), maker, failed)


def _store_vectors(parts: ScratchFiles, vectors: Vectors, maker: Embedder, failed: Sequence[Failure] = ()) -> Embedded:
    """With whose vectors they are, so that who commits them need not load the embedder."""
    by = parts.put_json(maker.identity.to_json()) if len(vectors) else ""
    return Embedded(part=parts.put_vectors(vectors), by=by, failed=list(failed))


def _embed_texts(by: EmbeddingBatcher, texts: Sequence[str], c: ToolContext, total: int) -> Vectors:
    """float32 (n, d).

    Raises:
        RetryLater: asking again may help.
        MeshError: it will not.
    """
    try:
        return by.documents(texts, lambda done: c.progress(f"{done}/{total} chunks"))
    except EmbedderError as e:
        if e.after_s is None:
            raise
        raise RetryLater(e, e.after_s) from None


@tool(queue="index", retries=5)
def index_batch(
    store: str, parts: str, batch: str, vectors: str, by: str, without: list[str], c: ToolContext = NOBODY
) -> Indexed:
    """Commit a batch: each document's new chunks in and its old ones out at once, unless somebody changed it meanwhile."""
    kept = ScratchFiles(store, parts)
    rows, at = kept.get_vectors(vectors), 0
    wanted: list[Replacement] = []
    failed: list[Failure] = []
    for one in kept.get_json(batch):
        if one["source"] in without:
            continue
        chunks = list(chunks_from_json(one["source"], one["chunks"]))
        mine = _without_zeros(rows[at : at + len(chunks)])
        at += len(chunks)
        if mine is None:
            failed.append(Failure(source=one["source"], why="the embedder knows none of its words"))
            continue
        wanted.append(Replacement(
            one["source"], chunks, mine, digest=one["digest"], expects=one["expects"], part=tuple(one["part"]), facts=one["facts"],
        ))  # fmt: skip
    identity = Identity.from_json(kept.get_json(by)) if by else None
    refused = _commit(store_of(store, identity), wanted, f"{c.key} {batch}")
    failed += [Failure(source=s, why=why) for s, why in refused.items()]
    done = [r for r in wanted if r.source not in refused]
    whole = sum(1 for r in done if r.part[0] == r.part[1])
    return Indexed(documents=whole, chunks=sum(len(r.chunks) for r in done), failed=failed)


def _without_zeros(rows: Vectors) -> Vectors | None:
    """A passage of which the embedder knows nothing (a ruler of dashes) stands where its document stands."""
    empty = np.abs(rows).sum(axis=1) == 0  # (n,)
    if not empty.any():
        return rows
    if empty.all():
        return None
    mean = rows[~empty].mean(axis=0)
    return np.where(empty[:, None], mean / (np.linalg.norm(mean) or 1), rows).astype(np.float32)


def _commit(store: FaissStore, wanted: Sequence[Replacement], key: str) -> dict[str, str]:
    """One commit for all; where one document cannot be kept, one for each. The sources that are not in, and why."""
    try:
        return _really_differ(store, wanted, store.replace_many(wanted, key=key).refused) if wanted else {}
    except (StoreFull, StoreDamaged):
        raise
    except StoreError:
        refused: dict[str, str] = {}
    for i, one in enumerate(wanted):
        try:
            refused |= _really_differ(store, [one], store.replace_many([one], key=f"{key} {i}").refused)
        except (StoreFull, StoreDamaged):
            raise
        except StoreError as e:
            refused[one.source] = str(e)
    return refused


def _really_differ(store: FaissStore, wanted: Sequence[Replacement], refused: Sequence[str]) -> dict[str, str]:
    """Those of the refused that the store has otherwise than wanted: an ingest beside this one may have done the same."""
    digests = {one.source: one.digest for one in wanted}
    known = {source: store.source(source) for source in refused}
    return {s: CHANGED_MEANWHILE for s, facts in known.items() if facts is None or facts.digest != digests[s]}
