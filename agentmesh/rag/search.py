"""The search of a retriever: over any store, by meaning, by words or by both, and as the passages that a model sees."""

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
MMR_OF = 4  # times k: among how many of the best hits maximal marginal relevance chooses


class Passage(BaseModel):
    """A passage as a model sees it: `text` is `[start:start + len(text)]` of the document `source`."""

    source: str
    start: int
    text: str
    heading: str = ""

    @classmethod
    def of(cls, hit: Hit) -> Self:
        """The passage of a hit."""
        return cls(source=hit.source, start=hit.start, text=hit.text, heading=" > ".join(hit.heading))


def check_search(k: int, mode: str, diverse: float) -> None:
    """Nothing, where the arguments of a search are in range.

    Raises:
        DefinitionError: one is not.
    """
    if k < 1:
        raise DefinitionError(f"search(k={k}): k must be at least 1")
    if mode not in MODES:
        raise DefinitionError(f"search(mode={mode!r}): mode must be one of {', '.join(MODES)}")
    if not 0 <= diverse <= 1:
        raise DefinitionError(f"search(diverse={diverse}) is out of range", hint="use 0 to 1")


def search(
    store: FaissStore | StoreView, embedder: Embedder, text: str, k: int, *, mode: Mode = "hybrid", where: Where | None = None,
    diverse: float = 0.0,
) -> list[Hit]:  # fmt: skip
    """The k best passages, best first; see `Retriever.search`."""
    vector, many = embedder.query(text), k * MMR_OF if diverse else k
    if mode == "text":
        hits = store.search_text(text, many, where=where, vector=vector)
    elif mode == "dense":
        hits = store.search(vector, many, where=where)
    else:
        hits = store.search_hybrid(text, vector, many, where=where)
    if not diverse or len(hits) <= k:
        return hits[:k]
    return [hits[i] for i in mmr(vector, _vectors(store, embedder, hits), k, relevance=1 - diverse)]


def _vectors(store: FaissStore | StoreView, embedder: Embedder, hits: Sequence[Hit]) -> Floats:
    """The hits' vectors; a store that does not give them has them made anew."""
    if isinstance(store, FaissStore):
        return store.vectors([hit.id for hit in hits])
    return embedder.documents([hit.text for hit in hits])
