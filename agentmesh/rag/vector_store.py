"""What a store of passages is, so that another than FAISS may stand in its place; and one behind a Retriever.

A store is declared in the entry-point group `agentmesh.stores`; `Retriever.open("lists:any")` then makes `Lists("any")`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from agentmesh import plugins
from agentmesh.errors import ConfigError, DefinitionError, did_you_mean
from agentmesh.rag.documents import Chunk, Hit
from agentmesh.rag.ranking import rrf

Filter = Mapping[str, Any]
_NAMED = re.compile(r"[A-Za-z][\w.+-]+:")  # at least two characters, for `C:` is a drive


class VectorStore(Protocol):
    """Chunks with their vectors. One object serves many threads; several processes may hold one each of the same store.

    Filters are Mongo's words over metadata and `source`: `agentmesh.rag.store.filters` has `parse` and `matches`.
    """

    def upsert(self, chunks: Sequence[Chunk], vectors: npt.ArrayLike) -> Any:
        """Chunks in; one with an id that is there takes its place.

        Args:
            vectors: float (n, d), of unit length, a row for each chunk.
        """
        ...

    def delete(self, ids: Sequence[str]) -> Any:
        """Chunks out; ids that are not there are no error."""
        ...

    def remove(self, sources: Sequence[str]) -> Any:
        """All chunks of these sources out; sources that are not there are no error."""
        ...

    def search(self, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k chunks nearest to a vector, best first: as many as pass the filter, if those are fewer.

        Args:
            vector: float (d,), of unit length; a hit's `score` is the cosine.
        """
        ...

    def search_text(self, query: str, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k chunks that hold most of a question's words, best first; [] where no chunk holds any."""
        ...

    def count(self, where: Filter | None = None) -> int:
        """How many chunks pass the filter."""
        ...

    def sources(self) -> Mapping[str, Any]:
        """What is known of each source that has chunks, by its name."""
        ...


def store_name(path: str | Path) -> str:
    """`lists` of "lists:any", which names a store of a plugin; "" for a folder.

    Raises:
        ConfigError: it looks like such a name, and there is neither a store nor a file of that name.
    """
    if not isinstance(path, str) or not _NAMED.match(path):
        return ""
    name = path.partition(":")[0]
    if plugins.find("stores", name) is not None:
        return name
    if Path(path).exists():
        return ""
    known = plugins.names("stores")
    raise ConfigError(
        f"unknown store {name!r} in {path!r}",
        hint=f"use one of: {', '.join(known)}.{did_you_mean(name, known)} For a folder of this name write './{path}'",
    )


class StoreView:
    """Any VectorStore as a Retriever uses one: behind filters, with hybrid search.

    Args:
        name: for errors.
        bound: filters that every search and count goes through.
    """

    def __init__(self, store: VectorStore, name: str, bound: Sequence[Filter] = ()) -> None:
        self.store, self.name, self._bound = store, name, tuple(bound)

    def bound(self, where: Filter) -> "StoreView":
        """The same store behind one more filter."""
        return StoreView(self.store, self.name, (*self._bound, where))

    def _both(self, where: Filter | None) -> Filter | None:
        filters = [f for f in (*self._bound, where) if f]
        return {"$and": filters} if len(filters) > 1 else filters[0] if filters else None

    def search(self, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """See VectorStore."""
        return self.store.search(vector, k, where=self._both(where))

    def search_text(self, query: str, k: int, *, where: Filter | None = None, vector: Any = None) -> list[Hit]:
        """See VectorStore; `vector` is not used."""
        return self.store.search_text(query, k, where=self._both(where))

    def search_hybrid(self, query: str, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k best by words and by vector together, fused by their ranks."""
        by_vector, by_text = self.search(vector, k, where=where), self.search_text(query, k, where=where)
        hits = {hit.id: hit for hit in (*by_text, *by_vector)}  # the vector's hit last: its score is the cosine
        fused = rrf([[hit.id for hit in by_vector], [hit.id for hit in by_text]])
        return [hits[chunk_id] for chunk_id, _ in fused[:k]]

    def count(self, where: Filter | None = None) -> int:
        """See VectorStore."""
        return self.store.count(self._both(where))

    def sources(self) -> Mapping[str, Any]:
        """See VectorStore; behind a filter, those with a chunk that passes."""
        sources = self.store.sources()
        return {s: facts for s, facts in sources.items() if not self._bound or self.count({"source": s})}

    def remove(self, sources: Sequence[str]) -> int:
        """See VectorStore; how many chunks went."""
        before = self.store.count()
        self.store.remove(sources)
        return before - self.store.count()

    def get(self, ids: Sequence[str]) -> list[Chunk | None]:
        """The chunks of ids, where the store has a `get`.

        Raises:
            DefinitionError: it has none.
        """
        get = getattr(self.store, "get", None)
        if get is None:
            raise DefinitionError(f"the store {self.name!r} has no `get`", hint="search it, or give it a `get(ids)`")
        chunks: list[Chunk | None] = get(ids)
        return chunks
