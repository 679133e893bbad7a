"""LangChain's VectorStore over our FAISS store: many processes at once, filters before the search, nothing pickled."""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from agentmesh.errors import DefinitionError, StoreError, well_formed
from agentmesh.langchain.documents import as_embeddings, is_value
from agentmesh.rag.documents import Chunk, Hit
from agentmesh.rag.embedders import embedder
from agentmesh.rag.embedders.base import Embedder
from agentmesh.rag.embedders.langchain import LangChainEmbedder
from agentmesh.rag.ranking import mmr
from agentmesh.rag.store.faiss_store import FaissStore

REST = "_rest"  # a field with the metadata that a store cannot filter by, as JSON
BATCH = 1000

Filter = Mapping[str, Any]


class FaissVectorStore(VectorStore):
    """A vector store in a folder, for LangChain. Scores are cosines: higher is better.

    Filters are written as in MongoDB, over the metadata: `{"year": {"$gte": 2020}, "lang": "en"}`. What is added is on the disk
    when the call returns, and other processes find it at once.
    """

    def __init__(
        self, path: str | Path, *, embedding: Embeddings | Embedder | str = "wordllama", metric: str | None = None
    ) -> None:
        """A store in a folder, which is made at the first `add_texts`; nothing is read or loaded yet.

        Args:
            embedding: LangChain Embeddings, an embedder of ours, or its name, such as "wordllama".
            metric: "cosine" or "l2"; None takes the folder's own, "cosine" for a new one.
        """
        self.path, self._metric = Path(path), metric
        self.embedder: Embedder = embedder(embedding)

    @cached_property
    def store(self) -> FaissStore:
        """The store itself. Embeds one sentence, to see whether the same embedder filled it."""
        store = FaissStore(self.path, metric=self._metric, identity=self.embedder.identity)
        if store.metric == "l2" and isinstance(self.embedder, LangChainEmbedder):
            # under l2 a vector's length counts, and old folders hold vectors that were not normalised
            self.embedder = LangChainEmbedder(self.embedder.embeddings, scaled=False)
        return store

    @property
    def embeddings(self) -> Embeddings:
        """The embedder, as LangChain's Embeddings."""
        return as_embeddings(self.embedder)

    @classmethod
    def from_texts(
        cls, texts: list[str], embedding: Any, metadatas: list[dict[str, Any]] | None = None, *,
        ids: list[str] | None = None, path: str | Path | None = None, **kwargs: Any,
    ) -> Self:  # fmt: skip
        """A store with these texts in it.

        Args:
            path: the folder.

        Raises:
            DefinitionError: there is no path.
        """
        if path is None:
            raise DefinitionError("FaissVectorStore.from_texts was given no folder", hint="write path='kb'")
        store = cls(path, embedding=embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, *,
        ids: Sequence[str | None] | None = None, **kwargs: Any,
    ) -> list[str]:  # fmt: skip
        """Adds texts, replacing those of the same ids; gives the ids.

        Raises:
            StoreError: the lists differ in length, an id occurs twice, or metadata is not JSON.
            EmbedderMismatch: another embedder filled the store.
        """
        clean = [well_formed(t) for t in texts]
        fields, names = metadatas or [{} for _ in clean], ids or [None] * len(clean)
        if not len(clean) == len(fields) == len(names):
            raise StoreError(f"{len(clean)} texts came with {len(fields)} metadatas and {len(names)} ids")
        chunks = [chunk_of(i or str(uuid.uuid4()), t, m) for t, m, i in zip(clean, fields, names, strict=True)]
        store = self.store
        for first in range(0, len(chunks), BATCH):
            batch = chunks[first : first + BATCH]
            store.upsert(batch, self.embedder.documents([c.text for c in batch]))
        return [c.id for c in chunks]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Removes documents; without ids, all of them. Unknown ids are ignored."""
        self.store.delete(self.store.ids() if ids is None else ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in their order; unknown ids are left out."""
        return [_document(chunk) for chunk in self.store.get(ids) if chunk is not None]

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, hybrid: bool = False, **kwargs: Any
    ) -> list[Document]:  # fmt: skip
        """The k nearest documents, best first; with `hybrid`, ranked by shared words as well."""
        scored = self.similarity_search_with_score(query, k, filter=filter, hybrid=hybrid)
        return [document for document, _ in scored]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, hybrid: bool = False, **kwargs: Any
    ) -> list[tuple[Document, float]]:  # fmt: skip
        """The k nearest documents and their cosines, best first."""
        store = self.store
        vector = self.embedder.query(query)
        if hybrid:
            return _scored(store.search_hybrid(query, vector, k, where=filter))
        return self.similarity_search_with_score_by_vector(vector, k, filter=filter)

    def similarity_search_by_vector(
        self, embedding: Sequence[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:  # fmt: skip
        """The k documents nearest to a vector, best first."""
        return [d for d, _ in self.similarity_search_with_score_by_vector(embedding, k, filter=filter)]

    def similarity_search_with_score_by_vector(
        self, embedding: Any, k: int = 4, *, filter: Filter | None = None
    ) -> list[tuple[Document, float]]:  # fmt: skip
        """The k documents nearest to a vector, and their cosines, best first."""
        return _scored(self.store.search(embedding, k, where=filter))

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, *,
        filter: Filter | None = None, **kwargs: Any,
    ) -> list[Document]:  # fmt: skip
        """k of the `fetch_k` nearest that differ from one another; `lambda_mult` 1 looks at nearness alone."""
        _ = self.store
        vector = self.embedder.query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, filter=filter)

    def max_marginal_relevance_search_by_vector(
        self, embedding: Any, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, *,
        filter: Filter | None = None, **kwargs: Any,
    ) -> list[Document]:  # fmt: skip
        """The same, from a vector.

        Source: Carbonell and Goldstein, The Use of MMR, SIGIR 1998.
        """
        hits = self.store.search(embedding, max(k, fetch_k), where=filter)
        if not hits:
            return []
        vectors = self.store.vectors([h.id for h in hits])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)  # under l2 they are not normalised
        query = np.asarray(embedding, np.float32)
        return [_document(hits[i]) for i in mmr(query / np.linalg.norm(query), vectors, k, relevance=lambda_mult)]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, cosine))


def chunk_of(chunk_id: str, text: str, metadata: Mapping[str, Any]) -> Chunk:
    """A LangChain document as a chunk; metadata that a store cannot filter by is kept as JSON.

    Raises:
        StoreError: the metadata is not JSON.
    """
    fields = {k: v for k, v in metadata.items() if is_value(v) and k != REST}
    if rest := {k: v for k, v in metadata.items() if k not in fields}:
        try:
            fields[REST] = json.dumps(rest)
        except (TypeError, ValueError) as e:
            raise StoreError(
                f"the metadata of document {chunk_id!r} cannot be kept: {e}", hint="give JSON values"
            ) from None
    start = metadata.get("start_index", 0)
    start = start if isinstance(start, int) and start >= 0 else 0
    return Chunk(chunk_id, text, str(metadata.get("source") or ""), start, metadata=fields)


def _document(chunk: Chunk | Hit) -> Document:
    metadata = dict(chunk.metadata)
    rest = metadata.pop(REST, None)
    if isinstance(rest, str):
        metadata.update(json.loads(rest))
    if chunk.source and "source" not in metadata:  # a passage of our own ingest
        metadata |= {"source": chunk.source, "start_index": chunk.start, "heading": list(chunk.heading)}
    return Document(id=chunk.id, page_content=chunk.text, metadata=metadata)


def _scored(hits: Iterable[Hit]) -> list[tuple[Document, float]]:
    return [(_document(hit), hit.score) for hit in hits]
