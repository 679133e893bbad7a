"""The search of a retriever over any store: by vector, by words or hybrid, and the passages that a model reads."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from agentmesh.errors import DefinitionError
from agentmesh.rag.documents import Hit
from agentmesh.rag.embedders.base import Embedder, Floats
from agentmesh.rag.ranking import mmr
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.vector_store import StoreView

Mode = Literal["hybrid", "dense", "text"]
Where = Mapping[str, Any]
Query = Annotated[str, Field(min_length=1)]  # of a model: no words have no direction to search in
MODES = ("hybrid", "dense", "text")
MMR_CANDIDATES = 4  # times k: the hits among which maximal marginal relevance chooses


class Passage(BaseModel):
    """A passage as a model reads it: `text` is `[start:start + len(text)]` of the document `source`."""

    source: str
    start: int
    text: str
    heading: str = ""

    @classmethod
    def of(cls, hit: Hit) -> Self:
        """The passage of a hit."""
        return cls(source=hit.source, start=hit.start, text=hit.text, heading=" > ".join(hit.heading))


def check_search(k: int, mode: str, diverse: float) -> None:
    """Check the arguments of a search.

    Raises:
        DefinitionError: one is out of range.
    """
    if k < 1:
        raise DefinitionError(f"search(k={k}) has a k below 1", hint="ask for at least one passage")
    if mode not in MODES:
        raise DefinitionError(f"search() has the unknown mode {mode!r}", hint=f"use one of: {', '.join(MODES)}")
    if not 0 <= diverse <= 1:
        raise DefinitionError(f"search(diverse={diverse}) is out of range", hint="use 0 to 1")


def search(
    store: FaissStore | StoreView, embedder: Embedder, text: str, k: int, *, mode: Mode = "hybrid", where: Where | None = None,
    diverse: float = 0.0,
) -> list[Hit]:  # fmt: skip
    """The k best passages, best first; see `Retriever.search`."""
    vector, candidates = embedder.query(text), k * MMR_CANDIDATES if diverse else k
    if mode == "text":
        hits = store.search_text(text, candidates, where=where, vector=vector)
    elif mode == "dense":
        hits = store.search(vector, candidates, where=where)
    else:
        hits = store.search_hybrid(text, vector, candidates, where=where)
    if not diverse or len(hits) <= k:
        return hits[:k]
    return [hits[i] for i in mmr(vector, _vectors(store, embedder, hits), k, relevance=1 - diverse)]


def _vectors(store: FaissStore | StoreView, embedder: Embedder, hits: Sequence[Hit]) -> Floats:
    """The hits' vectors, (n, d); embedded again where the store does not return them."""
    if isinstance(store, FaissStore):
        return store.vectors([hit.id for hit in hits])
    return embedder.documents([hit.text for hit in hits])
