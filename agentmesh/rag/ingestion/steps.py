"""The steps of an ingest as tools: plan, check, parse, embed, index, remove, compact, clean up.

Texts and vectors go from step to step in scratch files. Every step is idempotent, on any worker that sees the folders.
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
from agentmesh.rag.ingestion.plan import ChunkOptions, IngestRequest, Listing, PendingDocument, Refusal, StoredSource
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
NO_CONTEXT = ToolContext()

DocumentPart = tuple[dict[str, Any], list[Chunk]]  # what is committed of a document at once: its record, and chunks


@dataclass(frozen=True, slots=True)
class IngestPreview:
    """What an ingest would do.

    Args:
        vanished: with `sync`, the sources that vanished, each with its digest in the store.
        failed: what could not be listed.
        refusal: why nothing is to be done.
    """

    listing: Listing
    stored: Mapping[str, StoredSource]
    vanished: dict[str, str]
    failed: list[Failure]
    refusal: Refusal | None = None


def preview(store: str, request: IngestRequest) -> IngestPreview:
    """List the documents and compare them with the store; reads no document."""
    accepts = plan.matcher(request.glob) if request.glob else loaders.knows
    listing = plan.list_documents(request.paths, accepts=accepts, label=request.label, exclude=[store])
    stored = store_of(store).sources()
    failed = [Failure(source=s, why=reason) for s, reason in sorted(listing.unreadable.items())]
    refusal = plan.label_conflict(list(listing.documents.values()), stored, os.path.isdir)
    vanished = plan.vanished_sources(listing, stored, accepts) if request.sync else {}
    if vanished and not request.force:
        refusal = refusal or plan.removal_refusal(listing, stored, vanished)
    if not listing.documents and not failed and not vanished:
        refusal = refusal or _no_documents(request)
    return IngestPreview(listing, stored, vanished, failed, refusal)


def _no_documents(request: IngestRequest) -> Refusal:
    where = ", ".join(request.paths)
    if request.glob:
        return Refusal(
            message=f"there is no document in {where} that matches {request.glob!r}", hint="correct the glob"
        )
    return Refusal(
        message=f"there is no document in {where} that a loader can read", hint="name its files, or give a glob"
    )


def nothing_to_do(store: str, request: IngestRequest, how: ChunkOptions) -> Planned | None:
    """The plan of an ingest when the store has every document already; None when there may be something to do."""
    try:
        seen = preview(store, request)
        if seen.refusal or seen.vanished or any(plan.pending_documents(seen.listing, seen.stored, how.mark())):
            return None
    except MeshError:  # the run will report it
        return None
    remove_abandoned(store)
    return Planned(skipped=len(seen.listing.documents), failed=seen.failed)


@tool(queue="index", max_output_bytes=PLAN_BYTES)
def plan_ingest(store: str, request: IngestRequest, how: ChunkOptions, context: ToolContext = NO_CONTEXT) -> Planned:
    """List the documents, skip the unchanged ones, and cut the others into packs."""
    if missing := next((p for p in request.paths if not os.path.exists(p)), ""):
        return Planned(refused=f"there is no folder or file {missing!r} here", hint="name one that the workers see")
    remove_abandoned(store)
    seen = preview(store, request)
    if seen.refusal:
        return Planned(refused=seen.refusal.message, hint=seen.refusal.hint)
    scratch = ScratchFiles(store, context.key)
    pending = list(plan.pending_documents(seen.listing, seen.stored, how.mark()))
    packs = plan.split_into_packs(pending)
    return Planned(
        parts=context.key, packs=[scratch.put_json([document.model_dump() for document in pack]) for pack in packs],
        documents=len(pending), bytes=sum(document.size for document in pending),
        skipped=len(seen.listing.documents) - len(pending), failed=seen.failed,
        vanished=scratch.put_json(seen.vanished) if seen.vanished else "",
    )  # fmt: skip


@tool(queue="embed", name="check_embedder")  # its name in journals
def compare_embedder(store: str, embedder: str) -> Refusal | None:
    """Why the store refuses this embedder; None when it accepts it."""
    try:
        store_of(store, embedder_for(store, embedder).identity).version  # noqa: B018  # reading the store compares the two
    except MeshError as e:
        return Refusal(message=e.message, hint=e.hint)
    return None


@tool(queue="parse", retries=2)
def parse_pack(store: str, parts: str, pack: str, how: ChunkOptions) -> Parsed:
    """Read the documents of a pack and cut them into chunks; one that cannot be read is named in the result."""
    scratch = ScratchFiles(store, parts)
    pending = [PendingDocument(**data) for data in scratch.get_json(pack)]
    failed: list[Failure] = []
    document_parts: list[DocumentPart] = []
    for document in pending:
        try:
            digest, chunks = _read(document, how)
        except (MeshError, OSError) as e:
            failed.append(Failure(source=document.source, why=_reason(e)))
            continue
        if digest != document.expects:  # else it was changed back since the ingest was planned
            document_parts += _divide(document, digest, chunks, how)
    batches = [_put_batch(scratch, batch) for batch in _batched(document_parts)]
    return Parsed(batches=batches, bytes=sum(document.size for document in pending), failed=failed)


def _read(document: PendingDocument, how: ChunkOptions) -> tuple[str, list[Chunk]]:
    """The digest and the chunks of a document as it is on disk now.

    Raises:
        OSError, DocumentError: it cannot be read.
    """
    if document.size > loaders.MAX_FILE_BYTES:
        mib, most = document.size / 2**20, loaders.MAX_FILE_BYTES / 2**20
        raise DocumentError(f"it has {mib:.0f} MiB, and at most {most:.0f} MiB can be read", hint="split it")
    with open(document.path, "rb") as file:
        data = file.read()
    parsed = loaders.parse(data, os.path.basename(document.path), encoding=how.encoding)
    metadata = metadata_from_json(how.metadata)
    chunks = split(parsed, document.source, size=how.size, overlap=how.overlap, metadata=metadata)
    return plan.content_digest(data, how.mark()), chunks


def _divide(document: PendingDocument, digest: str, chunks: list[Chunk], how: ChunkOptions) -> list[DocumentPart]:
    """A document in parts of at most BATCH_CHUNKS chunks."""
    facts = {"size": document.size, "mtime_ns": document.mtime_ns, "how": how.mark(), "root": document.root}
    record = {"source": document.source, "digest": digest, "expects": document.expects, "facts": facts}
    n = max(1, -(-len(chunks) // BATCH_CHUNKS))
    return [({**record, "part": [i + 1, n]}, chunks[i * BATCH_CHUNKS : (i + 1) * BATCH_CHUNKS]) for i in range(n)]


def _batched(document_parts: Sequence[DocumentPart]) -> list[list[DocumentPart]]:
    batches: list[list[DocumentPart]] = []
    used = BATCH_CHUNKS
    for record, chunks in document_parts:
        if not batches or used + len(chunks) > BATCH_CHUNKS:
            batches.append([])
            used = 0
        batches[-1].append((record, chunks))
        used += len(chunks)
    return batches


def _put_batch(scratch: ScratchFiles, batch: Sequence[DocumentPart]) -> Batch:
    part = scratch.put_json([{**record, "chunks": chunks_to_json(chunks)} for record, chunks in batch])
    return Batch(part=part, chunks=sum(len(chunks) for _, chunks in batch))


@tool(queue="index")
def failures_of(store: str, parts: str, part: str, why: str) -> list[Failure]:
    """The documents of a pack or batch whose step failed for good."""
    return all_failed(ScratchFiles(store, parts).get_json(part), why)


@tool(queue="index", retries=5)
def remove_vanished(store: str, parts: str, vanished: str, context: ToolContext = NO_CONTEXT) -> int:
    """Remove vanished documents from the store, except those that another writer changed meanwhile; how many."""
    sources: dict[str, str] = ScratchFiles(store, parts).get_json(vanished)
    commit = store_of(store).remove(list(sources), expects=sources, key=f"{context.key} {vanished}")
    return len(sources) - len(commit.refused)


@tool(queue="index")
def compact(store: str) -> bool:
    """Merge large segments when it pays; whether it did. The vector index of a million chunks takes minutes."""
    faiss_store = store_of(store)
    return faiss_store.stats().wants_compaction and faiss_store.compact()


@tool(queue="index")
def clean_up(store: str, parts: str) -> None:
    """Remove the run's scratch files."""
    ScratchFiles(store, parts).remove()


def _reason(error: Exception) -> str:
    if isinstance(error, MeshError):
        return str(error)
    return f"the file cannot be read ({getattr(error, 'strerror', '') or error})"


# ---- Embedding and indexing ---------------------------------------------------------------------

CHANGED_MEANWHILE = "it was changed in the store by another writer in the meantime; add it again"


@tool(queue="embed", retries=5)
def embed_batch(store: str, parts: str, batch: str, embedder: str, context: ToolContext = NO_CONTEXT) -> Embedded:
    """Embed a batch; a document whose text the embedder refuses is left out and named."""
    scratch = ScratchFiles(store, parts)
    records = scratch.get_json(batch)
    texts = [[row[1] for row in record["chunks"]] for record in records]
    document_embedder = embedder_for(store, embedder)
    batcher = batcher_for(document_embedder)
    try:
        vectors = _embed(batcher, [t for of_one in texts for t in of_one], context)
        return _put_vectors(scratch, vectors, document_embedder)
    except MeshError as e:
        if len(records) == 1:
            none = np.zeros((0, 0), np.float32)
            return _put_vectors(scratch, none, document_embedder, all_failed(records, str(e)))
    failed: list[Failure] = []
    rows: list[Any] = []
    for record, of_one in zip(records, texts, strict=True):
        try:
            rows += list(_embed(batcher, of_one, context))
        except MeshError as e:
            failed.append(Failure(source=record["source"], why=str(e)))
    return _put_vectors(scratch, np.array(rows, np.float32), document_embedder, failed)


def _put_vectors(
    scratch: ScratchFiles, vectors: Vectors, embedder: Embedder, failed: Sequence[Failure] = ()
) -> Embedded:
    """Write the vectors and the embedder's identity, so that the worker that commits them need not load the embedder."""
    by = scratch.put_json(embedder.identity.to_json()) if len(vectors) else ""
    return Embedded(part=scratch.put_vectors(vectors), by=by, failed=list(failed))


def _embed(batcher: EmbeddingBatcher, texts: Sequence[str], context: ToolContext) -> Vectors:
    """The vectors of texts, float32 (n, d).

    Raises:
        RetryLater: a later attempt may succeed.
        MeshError: it will not.
    """
    try:
        return batcher.documents(texts, lambda done: context.progress(f"{done}/{len(texts)} chunks"))
    except EmbedderError as e:
        if e.after_s is None:
            raise
        raise RetryLater(e, e.after_s) from None


@tool(queue="index", retries=5)
def index_batch(
    store: str, parts: str, batch: str, vectors: str, by: str, exclude: list[str], context: ToolContext = NO_CONTEXT
) -> Indexed:
    """Commit a batch: each document is replaced atomically, unless another writer changed it meanwhile."""
    scratch = ScratchFiles(store, parts)
    rows, first = scratch.get_vectors(vectors), 0
    replacements: list[Replacement] = []
    failed: list[Failure] = []
    for record in scratch.get_json(batch):
        source = record["source"]
        if source in exclude:
            continue
        chunks = list(chunks_from_json(source, record["chunks"]))
        document_rows = _fill_zero_rows(rows[first : first + len(chunks)])
        first += len(chunks)
        if document_rows is None:
            failed.append(Failure(source=source, why="the embedder knows none of its words"))
            continue
        replacements.append(Replacement(
            source, chunks, document_rows, digest=record["digest"], expects=record["expects"],
            part=tuple(record["part"]), facts=record["facts"],
        ))  # fmt: skip
    identity = Identity.from_json(scratch.get_json(by)) if by else None
    refused = _commit(store_of(store, identity), replacements, f"{context.key} {batch}")
    failed += [Failure(source=source, why=reason) for source, reason in refused.items()]
    committed = [r for r in replacements if r.source not in refused]
    complete = sum(1 for r in committed if r.part[0] == r.part[1])
    return Indexed(documents=complete, chunks=sum(len(r.chunks) for r in committed), failed=failed)


def _fill_zero_rows(rows: Vectors) -> Vectors | None:
    """Give a chunk without any known word (a line of dashes) the mean direction of its document; None if all are so."""
    zero = np.abs(rows).sum(axis=1) == 0  # (n,)
    if not zero.any():
        return rows
    if zero.all():
        return None
    mean = rows[~zero].mean(axis=0)
    return np.where(zero[:, None], mean / (np.linalg.norm(mean) or 1), rows).astype(np.float32)


def _commit(store: FaissStore, replacements: Sequence[Replacement], key: str) -> dict[str, str]:
    """Commit all at once, or one by one where the store refuses a document; the refused sources, with the reason."""
    try:
        return (
            _conflicts(store, replacements, store.replace_many(replacements, key=key).refused) if replacements else {}
        )
    except (StoreFull, StoreDamaged):
        raise
    except StoreError:
        refused: dict[str, str] = {}
    for i, replacement in enumerate(replacements):
        try:
            commit = store.replace_many([replacement], key=f"{key} {i}")
            refused |= _conflicts(store, [replacement], commit.refused)
        except (StoreFull, StoreDamaged):
            raise
        except StoreError as e:
            refused[replacement.source] = str(e)
    return refused


def _conflicts(store: FaissStore, replacements: Sequence[Replacement], refused: Sequence[str]) -> dict[str, str]:
    """The refused sources that differ in the store: a concurrent ingest may have committed the same content."""
    digests = {r.source: r.digest for r in replacements}
    stored = {source: store.source(source) for source in refused}
    return {s: CHANGED_MEANWHILE for s, facts in stored.items() if facts is None or facts.digest != digests[s]}
