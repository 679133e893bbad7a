"""Documents into a store that takes no ingest run: read, cut, embedded and upserted in this process, one after another."""

import os
from collections.abc import Iterator

from agentmesh.errors import MeshError
from agentmesh.rag import loaders
from agentmesh.rag.documents import Chunk
from agentmesh.rag.embedders.base import Embedder
from agentmesh.rag.ingest import Added
from agentmesh.rag.ingestion.plan import ChunkOptions, DocumentFile, IngestRequest, list_documents, matcher
from agentmesh.rag.ingestion.scratch import Failure, metadata_from_json
from agentmesh.rag.splitter import split
from agentmesh.rag.vector_store import VectorStore

BATCH_CHUNKS = 256  # chunks that are embedded together


def add_directly(store: VectorStore, embedder: Embedder, request: IngestRequest, options: ChunkOptions) -> Added:
    """Each document's chunks in place of those that the store has of it; with `sync`, vanished documents leave it.

    A document that cannot be read is in `Added.failed`, and the store keeps what it had of it.
    """
    accepts = matcher(request.glob) if request.glob else loaders.knows
    listing = list_documents(request.paths, accepts=accepts, label=request.label)
    added = Added(failed=[Failure(source=s, why=why) for s, why in sorted(listing.unreadable.items())])
    for file in listing.documents.values():
        try:
            chunks = _read(file, options)
            rows = [row for batch in _batches(chunks) for row in embedder.documents([c.text for c in batch])]
        except (MeshError, OSError) as e:
            added.failed.append(Failure(source=file.source, why=str(e)))
            continue
        store.remove([file.source])
        store.upsert(chunks, rows)
        added.documents += 1
        added.chunks += len(chunks)
    if request.sync:
        below = tuple(f"{label}/" for label in listing.roots)
        vanished = [
            s
            for s in store.sources()
            if s.startswith(below) and s not in listing.documents and s not in listing.unreadable
        ]
        store.remove(vanished)
        added.removed = len(vanished)
    return added


def _read(file: DocumentFile, options: ChunkOptions) -> list[Chunk]:
    with open(file.path, "rb") as opened:
        data = opened.read()
    document = loaders.parse(data, os.path.basename(file.path), encoding=options.encoding)
    metadata = metadata_from_json(options.metadata)
    return split(document, file.source, size=options.size, overlap=options.overlap, metadata=metadata)


def _batches(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    for at in range(0, len(chunks), BATCH_CHUNKS):
        yield chunks[at : at + BATCH_CHUNKS]
