"""Our own store, embedders and loaders keep the public contracts; and these find what breaks a promise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh import plugins
from agentmesh.rag.documents import Chunk, Document, Heading
from agentmesh.rag.embedders import embedder
from agentmesh.rag.embedders.base import BaseEmbedder, Embedder
from agentmesh.rag.loaders import Loader
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.vector_store import VectorStore
from agentmesh.testing.contracts import EmbedderContract, StoreContract, check_embedder, check_loader


class TestFaissStore(StoreContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path / "kb"

    def make(self) -> VectorStore:
        return FaissStore(self.path)

    def reopen(self, store: VectorStore) -> VectorStore:
        return FaissStore(self.path)

    def fill(self, store: VectorStore, chunks: Sequence[Chunk], rows: Any) -> None:
        assert isinstance(store, FaissStore)
        for source in dict.fromkeys(c.source for c in chunks):
            mine = [i for i, c in enumerate(chunks) if c.source == source]
            store.replace(source, [chunks[i] for i in mine], rows[mine], digest="1")


class TestWordLlama(EmbedderContract):
    name = "wordllama"

    def make(self) -> Embedder:
        return embedder("wordllama")


@pytest.mark.parametrize(
    ("name", "data", "holds"),
    [
        ("a.txt", b"some text", "some text"),
        ("a.md", b"# Title\n\nsome text\n\nMore\n----\n", "some text"),
        ("a.html", b"<html><body><h1>T</h1><p>some text</p></body></html>", "some text"),
        ("a.csv", b"name,size\nsome text,3\nother,4\n", "some text"),
        ("a.jsonl", b'{"text": "some text", "year": 2026}\n{"text": "other"}\n', "some text"),
    ],
)
def test_our_loaders(name: str, data: bytes, holds: str) -> None:
    check_loader(lambda: plugins.load_plugin("loaders", name.partition(".")[2]), name=name, data=data, holds=holds)


class Lengths(BaseEmbedder):
    """Keeps every promise but those that a test takes from it."""

    def embed(self, texts: list[str]) -> Any:
        return [[len(t), 1.0, t.count("t")] for t in texts]


def test_an_embedder_of_one_method_keeps_it() -> None:
    check_embedder(lambda: Lengths("any"))


def test_a_broken_embedder_is_found() -> None:
    class OfItsBatch(Lengths):
        def embed(self, texts: list[str]) -> Any:
            return np.array(super().embed(texts)) + np.arange(len(texts))[:, None]

    with pytest.raises(AssertionError, match="has another vector on its own"):
        check_embedder(lambda: OfItsBatch("any"))

    class Long(Lengths):
        scaled = False

    with pytest.raises(AssertionError, match="not of unit length"):
        check_embedder(lambda: Long("any"))


def read(data: bytes, name: str, encoding: str) -> Document:
    return Document(data.decode(encoding, errors="replace"))


def unordered(data: bytes, name: str, encoding: str) -> Document:
    return Document("some text", headings=(Heading(5, 1, "b", 6), Heading(0, 1, "a", 1)))


def raises(data: bytes, name: str, encoding: str) -> Document:
    return Document(data.decode("ascii"))


def test_broken_loaders_are_found() -> None:
    def make(loader: Loader) -> Any:
        return lambda: loader

    check_loader(make(read))
    with pytest.raises(AssertionError, match="headings are not in the order"):
        check_loader(make(unordered))
    with pytest.raises(AssertionError, match="raised UnicodeDecodeError"):
        check_loader(make(raises))
