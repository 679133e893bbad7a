"""The two last steps of an ingest as tools: a batch's vectors, and its commit. Each may be done again, by any worker."""

from collections.abc import Sequence

import numpy as np

from agentmesh.errors import EmbedderError, MeshError, StoreDamaged, StoreError, StoreFull
from agentmesh.model import RetryLater
from agentmesh.rag.embedder import Embedder, Identity
from agentmesh.rag.here import embedder_for, shared, store_of
from agentmesh.rag.packing import Replacement
from agentmesh.rag.parts import Parts, chunks_from_json
from agentmesh.rag.reports import Embedded, Failure, Indexed, blamed
from agentmesh.rag.sharing import Shared, Vectors
from agentmesh.rag.store import FaissStore
from agentmesh.step import ToolContext
from agentmesh.tool import tool

CHANGED = "it was changed in the store by somebody else meanwhile; add it again"
NOBODY = ToolContext()


@tool(queue="embed", retries=5)
def embed_batch(store: str, parts: str, batch: str, embedder: str, c: ToolContext = NOBODY) -> Embedded:
    """The vectors of a batch; a document whose text the embedder refuses is left out and named."""
    kept = Parts(store, parts)
    documents = kept.get_json(batch)
    texts = [[row[1] for row in one["chunks"]] for one in documents]
    maker = embedder_for(store, embedder)
    by = shared(maker)
    try:
        vectors = _embedded(by, [t for some in texts for t in some], c, sum(len(t) for t in texts))
        return _kept(kept, vectors, maker)
    except MeshError as e:
        if len(documents) == 1:
            return _kept(kept, np.zeros((0, 0), np.float32), maker, blamed(documents, e.message))
    failed: list[Failure] = []
    rows = []
    for one, some in zip(documents, texts, strict=True):
        try:
            rows += list(_embedded(by, some, c, len(some)))
        except MeshError as e:
            failed.append(Failure(source=one["source"], why=e.message))
    return _kept(kept, np.array(rows, np.float32), maker, failed)


def _kept(parts: Parts, vectors: Vectors, maker: Embedder, failed: Sequence[Failure] = ()) -> Embedded:
    """With whose vectors they are, so that who commits them need not load the embedder."""
    by = parts.put_json(maker.identity.to_json()) if len(vectors) else ""
    return Embedded(part=parts.put_vectors(vectors), by=by, failed=list(failed))


def _embedded(by: Shared, texts: Sequence[str], c: ToolContext, total: int) -> Vectors:
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
    kept = Parts(store, parts)
    rows, at = kept.get_vectors(vectors), 0
    wanted: list[Replacement] = []
    failed: list[Failure] = []
    for one in kept.get_json(batch):
        if one["source"] in without:
            continue
        chunks = list(chunks_from_json(one["source"], one["chunks"]))
        mine = _filled(rows[at : at + len(chunks)])
        at += len(chunks)
        if mine is None:
            failed.append(Failure(source=one["source"], why="the embedder knows no word of it"))
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


def _filled(rows: Vectors) -> Vectors | None:
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
        return _differ(store, wanted, store.replace_many(wanted, key=key).refused) if wanted else {}
    except (StoreFull, StoreDamaged):
        raise
    except StoreError:
        refused: dict[str, str] = {}
    for i, one in enumerate(wanted):
        try:
            refused |= _differ(store, [one], store.replace_many([one], key=f"{key} {i}").refused)
        except (StoreFull, StoreDamaged):
            raise
        except StoreError as e:
            refused[one.source] = e.message
    return refused


def _differ(store: FaissStore, wanted: Sequence[Replacement], refused: Sequence[str]) -> dict[str, str]:
    """Those of the refused that the store has otherwise than wanted: an ingest beside this one may have done the same."""
    digests = {one.source: one.digest for one in wanted}
    known = {source: store.source(source) for source in refused}
    return {s: CHANGED for s, facts in known.items() if facts is None or facts.digest != digests[s]}
