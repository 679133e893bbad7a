"""LangChain's conformance suite over our store, and what it does not test: filters, scores, loaders, imported folders."""

import asyncio
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests.vectorstores import VectorStoreIntegrationTests
from langchain_text_splitters import CharacterTextSplitter, RecursiveCharacterTextSplitter

from agentmesh import DefinitionError, DocumentError, EmbedderMismatch, MeshError, StoreError
from agentmesh.langchain import FaissVectorStore, as_embeddings, as_splitter, import_folder, load_with
from agentmesh.rag.documents import Document as Ours
from agentmesh.rag.embedders import embedder
from agentmesh.rag.splitter import split
from agentmesh.rag.store.faiss_store import FaissStore

FAKE = DeterministicFakeEmbedding(size=6)


class TestConformance(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, tmp_path: Path) -> VectorStore:  # type: ignore[override]
        return FaissVectorStore(tmp_path / "kb", embedding=self.get_embeddings())


def words(path: Path, texts: list[str], metadatas: list[dict[str, Any]] | None = None) -> FaissVectorStore:
    return FaissVectorStore.from_texts(
        texts, "wordllama", metadatas, path=path, ids=[f"d{i}" for i in range(len(texts))]
    )


def test_a_filter_never_returns_too_few_hits(tmp_path: Path) -> None:
    store = words(tmp_path, [f"page {i}" for i in range(300)], [{"n": i, "rare": i % 100 == 0} for i in range(300)])
    assert len(store.similarity_search("page", k=3, filter={"rare": True})) == 3
    assert len(store.similarity_search("page", k=5, filter={"rare": True, "n": {"$gt": 50}})) == 2
    retriever = store.as_retriever(search_kwargs={"k": 2, "filter": {"n": {"$in": [7, 8]}}})
    assert {d.metadata["n"] for d in retriever.invoke("page")} == {7, 8}
    with pytest.raises(MeshError, match="function"):
        store.similarity_search("page", filter=lambda m: True)


def test_scores_hybrid_and_differences(tmp_path: Path) -> None:
    texts = ["the cat sat", "the cat sat down", "error E4711 in the pump", "steel costs more"]
    store = words(tmp_path, texts)
    (best, score), *_ = store.similarity_search_with_score("a cat sat", k=2)
    assert best.page_content.startswith("the cat sat")
    assert 0.5 < score <= 1.0
    assert store.similarity_search("weather E4711", k=1, hybrid=True)[0].id == "d2"
    relevant = store.similarity_search_with_relevance_scores("a cat sat", k=4)
    assert all(0 <= s <= 1 for _, s in relevant)
    diverse = store.max_marginal_relevance_search("cat sat", k=2, fetch_k=4, lambda_mult=0.1)
    assert len({d.page_content for d in diverse} & {"the cat sat", "the cat sat down"}) == 1
    assert [d.id for d in asyncio.run(store.asimilarity_search("steel", k=1))] == ["d3"]
    assert len(asyncio.run(store.amax_marginal_relevance_search("steel", k=3))) == 3
    retriever = store.as_retriever(search_type="mmr", search_kwargs={"k": 2, "fetch_k": 4})
    assert len(retriever.invoke("cat")) == 2


def test_metadata_comes_back_as_it_was(tmp_path: Path) -> None:
    metadata = {
        "a": 1, "b": [1, {"c": None}], "tags": ["x"], "when": datetime(2026, 1, 2, tzinfo=UTC), "big": 2**70,
        "none": None, "source": "a.md",
    }  # fmt: skip
    store = FaissVectorStore(tmp_path, embedding=FAKE)
    store.add_documents([Document("text", metadata=metadata, id="1")])
    (document,) = FaissVectorStore(tmp_path, embedding=FAKE).get_by_ids(["1"])
    assert document == Document("text", metadata=metadata, id="1")
    with pytest.raises(StoreError, match="document '2' cannot be kept"):
        store.add_documents([Document("text", metadata={"x": object()}, id="2")])
    with pytest.raises(StoreError, match="2 texts came with 1 metadatas"):
        store.add_texts(["a", "b"], [{}])
    with pytest.raises(StoreError, match="'x' is twice"):
        store.add_texts(["a", "b"], ids=["x", "x"])
    assert store.get_by_ids(["2", "x"]) == []


def test_another_embedder_is_refused_and_opening_reads_nothing(tmp_path: Path) -> None:
    words(tmp_path / "kb", ["a"])
    with pytest.raises(EmbedderMismatch):
        FaissVectorStore(tmp_path / "kb", embedding=DeterministicFakeEmbedding(size=256)).similarity_search("a")
    FaissVectorStore(tmp_path / "new", embedding=FAKE)
    assert not (tmp_path / "new").exists()
    with pytest.raises(DefinitionError, match="was given no folder"):
        FaissVectorStore.from_texts(["a"], FAKE)


def test_delete_without_ids_removes_all(tmp_path: Path) -> None:
    store = words(tmp_path, ["a", "b"])
    assert store.delete(["d0", "no"])
    assert store.delete()
    assert store.similarity_search("a") == []


def test_a_passage_of_an_ingest_has_its_source_and_start(tmp_path: Path) -> None:
    ours = embedder()
    chunks = split(Ours("One. Two."), "docs/a.md", size=5, overlap=0)
    FaissStore(tmp_path, identity=ours.identity).replace(
        "docs/a.md", chunks, ours.documents([c.text for c in chunks]), digest="x"
    )
    metadata = {d.page_content: d.metadata for d in FaissVectorStore(tmp_path).similarity_search("two")}
    assert metadata["Two."] == {"source": "docs/a.md", "start_index": 5, "heading": []}


class Pages(BaseLoader):
    def __init__(self, *pages: Document, broken: bool = False) -> None:
        self.pages, self.broken = pages, broken

    def lazy_load(self) -> Iterator[Document]:
        yield from self.pages
        if self.broken:
            raise OSError("disk gone")


def test_loaders_splitters_and_embeddings() -> None:
    one = Document("a b", metadata={"source": "a.pdf", "page": 0, "x": None})
    two = Document("c", metadata={"source": "a.pdf"})
    assert list(load_with(Pages(one, two))) == [
        ("a.pdf", Ours("a b", metadata={"source": "a.pdf", "page": 0})),
        ("a.pdf#2", Ours("c", metadata={"source": "a.pdf"})),
    ]
    with pytest.raises(DocumentError, match="Pages raised OSError: disk gone"):
        list(load_with(Pages(one, broken=True)))
    with pytest.raises(DefinitionError, match="LangChain loader"):
        list(load_with("docs/"))  # type: ignore[arg-type]

    document = Ours("word " * 50 + "\n\n" + "word " * 50, metadata={"lang": "en"})
    cut = as_splitter(RecursiveCharacterTextSplitter(chunk_size=100, chunk_overlap=20))
    chunks = cut(document, "w.txt", metadata={"n": 1})
    assert len(chunks) > 4
    assert all(document.text[c.start : c.end] == c.text for c in chunks)
    assert len({c.id for c in chunks}) == len(chunks)
    assert chunks[0].metadata == {"lang": "en", "n": 1}

    class Shouting(CharacterTextSplitter):
        def split_text(self, text: str) -> list[str]:
            return [text.upper()]

    with pytest.raises(DocumentError, match="Shouting changed the text of 'w.txt'"):
        as_splitter(Shouting())(Ours("a b c"), "w.txt")
    with pytest.raises(DefinitionError, match="text splitter"):
        as_splitter(3)

    theirs = as_embeddings(embedder())
    assert np.allclose(theirs.embed_query("a"), embedder().query("a"))
    assert np.shape(theirs.embed_documents(["a", "b"])) == (2, 256)
    assert as_embeddings(embedder(FAKE)) is FAKE


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What langchain-community's own FAISS store saves."""
    folder = tmp_path_factory.mktemp("old")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from langchain_community.vectorstores import FAISS

        metadatas = [{"n": i, "when": datetime(2026, 1, 1), "source": "a.md"} for i in range(50)]
        theirs = FAISS.from_texts([f"old page {i}" for i in range(50)], FAKE, metadatas, ids=[f"o{i}" for i in range(50)])  # fmt: skip
        theirs.delete(["o7"])
        theirs.save_local(str(folder))
    return folder


def test_an_old_folder_is_imported(old_folder: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    store = import_folder(
        old_folder, tmp_path / "kb", embedding=FAKE, trust_pickle=True, progress=lambda *p: progress.append(p)
    )
    assert (store.metric, store.count(), progress) == ("l2", 49, [(49, 49)])
    imported = FaissVectorStore(tmp_path / "kb", embedding=FAKE)
    best = imported.similarity_search("old page 11", k=2, filter={"n": {"$gt": 10}})[0]
    assert (best.id, best.page_content, best.metadata["n"]) == ("o11", "old page 11", 11)
    assert import_folder(old_folder, tmp_path / "kb", trust_pickle=True).count() == 49


def test_an_old_folder_that_cannot_be_read(old_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="trust_pickle=True"):
        import_folder(old_folder, tmp_path / "kb")
    with pytest.raises(StoreError, match=r"it has no index\.faiss"):
        import_folder(tmp_path, tmp_path / "kb", trust_pickle=True)
    with pytest.raises(EmbedderMismatch, match="did not make these vectors"):
        import_folder(old_folder, tmp_path / "kb", embedding="wordllama", trust_pickle=True)
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "index.faiss").write_bytes((old_folder / "index.faiss").read_bytes())

    class Evil:
        def __reduce__(self) -> Any:
            return subprocess.check_call, ([sys.executable, "-c", f"open({str(tmp_path / 'owned')!r}, 'w')"],)

    (evil / "index.pkl").write_bytes(pickle.dumps((Evil(), {})))
    with pytest.raises(StoreError, match="names subprocess.check_call"):
        import_folder(evil, tmp_path / "kb", trust_pickle=True)
    assert not (tmp_path / "owned").exists()
    (evil / "index.faiss").write_bytes(b"IxF2" + b"\xff" * 100)
    with pytest.raises(StoreError, match="cannot be imported"):
        import_folder(evil, tmp_path / "kb", trust_pickle=True)
