"""Ingest without a run, for stores of plugins: documents are read, split, embedded and upserted in this process."""

from collections.abc import Callable, Iterator

from agentmesh.errors import MeshError, RunFailedError
from agentmesh.rag import loaders
from agentmesh.rag.documents import Chunk
from agentmesh.rag.embedders.base import Embedder
from agentmesh.rag.ingest import Added
from agentmesh.rag.ingestion.plan import ChunkOptions, DocumentFile, IngestRequest, Listing, list_documents, matcher
from agentmesh.rag.ingestion.scratch import Failure, metadata_from_json
from agentmesh.rag.splitter import split
from agentmesh.rag.vector_store import VectorStore

BATCH_CHUNKS = 256  # chunks that are embedded together


def add_directly(store: VectorStore, embedder: Embedder, request: IngestRequest, options: ChunkOptions) -> Added:
    """Replace the chunks of each document in the store; with `sync`, remove documents that have vanished.

    A document that cannot be read is listed in `Added.failed`, and the store keeps its old chunks.

    Raises:
        RunFailedError: no document was found; or, without `force`, more than half of a folder's documents vanished.
    """
    accepts = matcher(request.glob) if request.glob else loaders.knows
    listing = list_documents(request.paths, accepts=accepts, label=request.label)
    vanished = _vanished(store, listing, accepts, force=request.force) if request.sync else []
    if not listing.documents and not listing.unreadable and not vanished:
        raise RunFailedError(
            f"there is no document in {', '.join(request.paths)}", hint="name its files, or give a glob"
        )
    added = Added(failed=[Failure(source=s, why=why) for s, why in sorted(listing.unreadable.items())])
    for file in listing.documents.values():
        try:
            chunks = _read(file, options)
            rows = [row for batch in _batches(chunks) for row in embedder.documents([c.text for c in batch])]
        except MeshError as e:
            added.failed.append(Failure(source=file.source, why=str(e)))
            continue
        store.remove([file.source])
        store.upsert(chunks, rows)
        added.documents += 1
        added.chunks += len(chunks)
    if vanished:
        store.remove(vanished)
        added.removed = len(vanished)
    return added


def _vanished(store: VectorStore, listing: Listing, accepts: Callable[[str], bool], *, force: bool) -> list[str]:
    """The sources of these folders that are not on disk any more, without those in folders that cannot be read."""
    vanished: list[str] = []
    for label, root in listing.roots.items():
        below = [s for s in store.sources() if s.startswith(f"{label}/")]
        unread = tuple(listing.unreadable)
        gone = [
            s for s in below if s not in listing.documents and not s.startswith(unread) and accepts(s[len(label) + 1 :])
        ]
        if 2 * len(gone) > len(below) and not force:
            raise RunFailedError(
                f"{len(gone)} of {len(below)} documents vanished from {root}, and nothing was removed",
                hint="check that the folder is mounted, or sync with `force` to remove them",
            )
        vanished += gone
    return vanished


def _read(file: DocumentFile, options: ChunkOptions) -> list[Chunk]:
    document = loaders.load_document(file.path, encoding=options.encoding)
    metadata = metadata_from_json(options.metadata)
    return split(document, file.source, size=options.size, overlap=options.overlap, metadata=metadata)


def _batches(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    for start in range(0, len(chunks), BATCH_CHUNKS):
        yield chunks[start : start + BATCH_CHUNKS]
