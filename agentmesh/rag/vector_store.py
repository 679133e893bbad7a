"""The interface of stores, and the view of a store that a Retriever uses.

A plugin declares a store in the entry-point group `agentmesh.stores`; `Retriever.open("lists:any")` then makes `Lists("any")`.
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
_PLUGIN_NAME = re.compile(r"[A-Za-z][\w.+-]+:")  # at least two characters, because `C:` is a drive


class VectorStore(Protocol):
    """Chunks with their vectors. One object serves many threads, and several processes may open the same store.

    Filters have MongoDB's syntax, over metadata and `source`: `agentmesh.rag.store.filters` has `parse` and `matches`.
    """

    def upsert(self, chunks: Sequence[Chunk], vectors: npt.ArrayLike) -> Any:
        """Add chunks; a chunk replaces one with the same id.

        Args:
            vectors: float (n, d), of unit length, one row for each chunk.
        """
        ...

    def delete(self, ids: Sequence[str]) -> Any:
        """Delete chunks; unknown ids are ignored."""
        ...

    def remove(self, sources: Sequence[str]) -> Any:
        """Delete all chunks of these sources; unknown sources are ignored."""
        ...

    def search(self, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k chunks nearest to a vector, best first; fewer where fewer pass the filter.

        Args:
            vector: float (d,), of unit length; a hit's `score` is the cosine.
        """
        ...

    def search_text(self, query: str, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k chunks that match the words of a query best, best first; [] where no chunk has any of them."""
        ...

    def count(self, where: Filter | None = None) -> int:
        """How many chunks pass the filter."""
        ...

    def sources(self) -> Mapping[str, Any]:
        """What the store records of each source that has chunks, by its name."""
        ...


def store_name(path: str | Path) -> str:
    """The plugin of a store's name, `lists` of "lists:any"; "" for a folder.

    Raises:
        ConfigError: it looks like such a name, and neither a plugin nor a file has it.
    """
    if not isinstance(path, str) or not _PLUGIN_NAME.match(path):
        return ""
    name = path.partition(":")[0]
    if plugins.find("stores", name) is not None:
        return name
    if Path(path).exists():
        return ""
    names = plugins.names("stores")
    raise ConfigError(
        f"unknown store {name!r} in {path!r}",
        hint=f"use one of: {', '.join(names)}.{did_you_mean(name, names)} For a folder of this name write './{path}'",
    )


class StoreView:
    """A VectorStore as a Retriever uses it: with bound filters and hybrid search.

    Args:
        name: for errors.
        bound: filters applied to every search and count.
    """

    def __init__(self, store: VectorStore, name: str, bound: Sequence[Filter] = ()) -> None:
        self.store, self.name, self._bound = store, name, tuple(bound)

    def bound(self, where: Filter) -> "StoreView":
        """The same store with one more bound filter."""
        return StoreView(self.store, self.name, (*self._bound, where))

    def _combined(self, where: Filter | None) -> Filter | None:
        filters = [f for f in (*self._bound, where) if f]
        return {"$and": filters} if len(filters) > 1 else filters[0] if filters else None

    def search(self, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """See VectorStore."""
        return self.store.search(vector, k, where=self._combined(where))

    def search_text(self, query: str, k: int, *, where: Filter | None = None, vector: Any = None) -> list[Hit]:
        """See VectorStore; `vector` is not used."""
        return self.store.search_text(query, k, where=self._combined(where))

    def search_hybrid(self, query: str, vector: npt.ArrayLike, k: int, *, where: Filter | None = None) -> list[Hit]:
        """The k best by words and by vector, fused by reciprocal rank fusion."""
        by_vector, by_text = self.search(vector, k, where=where), self.search_text(query, k, where=where)
        hits = {hit.id: hit for hit in (*by_text, *by_vector)}  # hits by vector last, because their score is the cosine
        fused = rrf([[hit.id for hit in by_vector], [hit.id for hit in by_text]])
        return [hits[chunk_id] for chunk_id, _ in fused[:k]]

    def count(self, where: Filter | None = None) -> int:
        """See VectorStore."""
        return self.store.count(self._combined(where))

    def sources(self) -> Mapping[str, Any]:
        """See VectorStore; with bound filters, the sources with a chunk that passes."""
        sources = self.store.sources()
        return {s: facts for s, facts in sources.items() if not self._bound or self.count({"source": s})}

    def remove(self, sources: Sequence[str]) -> int:
        """See VectorStore; returns how many chunks were deleted."""
        before = self.store.count()
        self.store.remove(sources)
        return before - self.store.count()

    def get(self, ids: Sequence[str]) -> list[Chunk | None]:
        """The chunks of these ids, by the store's `get`.

        Raises:
            DefinitionError: the store has no `get`.
        """
        get = getattr(self.store, "get", None)
        if get is None:
            raise DefinitionError(f"the store {self.name!r} has no `get`", hint="search it, or give it a `get(ids)`")
        chunks: list[Chunk | None] = get(ids)
        return chunks
