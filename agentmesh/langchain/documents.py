"""LangChain's loaders, splitters and embeddings as ours, and our embedders as its."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document as LangChainDocument
from langchain_core.embeddings import Embeddings

from agentmesh.errors import DefinitionError, DocumentError, well_formed
from agentmesh.rag.documents import Chunk, Document, Value
from agentmesh.rag.embedders.base import Embedder


class TextSplitter(Protocol):
    """What is needed of a LangChain text splitter."""

    def split_text(self, text: str) -> Sequence[Any]:
        """The pieces of a text: strings, or Documents."""
        ...


class _Embeddings(Embeddings):
    """One of our embedders as LangChain's Embeddings."""

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self.embedder.documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        vector: list[float] = self.embedder.query(text).tolist()
        return vector


def as_embeddings(embedder: Embedder) -> Embeddings:
    """An embedder as LangChain's Embeddings; where it wraps such an object, that object."""
    wrapped = getattr(embedder, "embeddings", None)
    return wrapped if isinstance(wrapped, Embeddings) else _Embeddings(embedder)


def load_with(loader: BaseLoader) -> Iterator[tuple[str, Document]]:
    """The documents of a LangChain loader as (source, document), ready for `split` and `replace`.

    Documents of one source, such as the pages of a PDF, are given one after the other as `source`, `source#2`, ….

    Raises:
        DocumentError: the loader raised.
    """
    if not isinstance(loader, BaseLoader):
        raise DefinitionError(f"load_with was given {type(loader).__name__}", hint="give it a LangChain loader")
    seen: dict[str, int] = {}
    documents = iter(loader.lazy_load())
    while True:
        try:
            document = next(documents, None)
        except Exception as e:
            # a loader is any code, so it may raise anything
            raise DocumentError(f"{type(loader).__name__} raised {type(e).__name__}: {e}") from e
        if document is None:
            return
        source = str(document.metadata.get("source") or type(loader).__name__)
        seen[source] = seen.get(source, 0) + 1
        name = source if seen[source] == 1 else f"{source}#{seen[source]}"
        yield name, Document(well_formed(document.page_content), metadata=plain(document.metadata))


def as_splitter(splitter: TextSplitter) -> Callable[..., list[Chunk]]:
    """A LangChain text splitter as a function in the place of `split`, called with a document and its source.

    Raises (when called):
        DocumentError: the splitter changed the text, so that a chunk does not occur in it.
    """
    if not callable(getattr(splitter, "split_text", None)):
        raise DefinitionError(
            f"as_splitter was given {type(splitter).__name__}", hint="give it a LangChain text splitter"
        )

    def split(document: Document, source: str, *, metadata: Mapping[str, Value] | None = None) -> list[Chunk]:
        chunks: list[Chunk] = []
        at = 0
        for piece in splitter.split_text(document.text):
            text = piece.page_content if isinstance(piece, LangChainDocument) else piece
            start = document.text.find(text, at)
            if start < 0:
                raise DocumentError(
                    f"{type(splitter).__name__} changed the text of {source!r}: {text[:40]!r} is not in it",
                    hint="use a splitter that only cuts",
                    source=source,
                )
            at = start + 1
            fields = {**document.metadata, **(metadata or {})}
            if isinstance(piece, LangChainDocument):
                fields = {**plain(piece.metadata), **fields}
            chunks.append(Chunk(f"{source}#{start}", text, source, start, metadata=fields))
        return chunks

    return split


def plain(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """The metadata that a store can keep and filter by."""
    return {str(k): v for k, v in metadata.items() if is_value(v) and not str(k).startswith(("$", "\0"))}


def is_value(value: Any) -> bool:
    """Whether a store can keep a value, and filter by it."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, list):
        return all(isinstance(v, str) for v in value)
    return isinstance(value, str | datetime)
