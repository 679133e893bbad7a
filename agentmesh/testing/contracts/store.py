"""The contract of a VectorStore."""

import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest import SkipTest

import numpy as np
from numpy.typing import NDArray

from agentmesh.rag.documents import Chunk
from agentmesh.rag.vector_store import VectorStore
from agentmesh.testing.contracts.base import Contract, check

WIDTH = 8  # of the vectors
CLOSE = 1e-3  # of a score to the cosine
CHUNKS = (
    Chunk("tea#0", "Tea is made in the kitchen.", "tea.md", 0, ("Tea",), {"year": 2024, "tags": ["drink", "warm"]}),
    Chunk("tea#9", "It is served at four.", "tea.md", 27, ("Tea",), {"year": 2024}),
    Chunk("pay#0", "Wages are paid on Friday.", "pay.md", 0, (), {"year": 2026}),
    Chunk("cat#0", "A cat sleeps on the roof.", "cat.md"),
)


def vectors(*rows: int) -> NDArray[np.float32]:
    """Orthogonal unit vectors, float32 (n, 8)."""
    return np.eye(WIDTH, dtype=np.float32)[list(rows)]


class StoreContract(Contract):
    """Tests of a VectorStore. `make` makes an empty one each time."""

    def make(self) -> VectorStore:
        """A new and empty store."""
        raise NotImplementedError(f"{type(self).__name__} needs `make`")

    def reopen(self, store: VectorStore) -> VectorStore:
        """The same store as another process opens it."""
        raise SkipTest("`reopen` is not overridden: whether the store is durable is not tested")

    def fill(self, store: VectorStore, chunks: Sequence[Chunk], rows: NDArray[np.float32]) -> None:
        """Add whole documents: by `upsert`, unless the store has a method for documents."""
        store.upsert(chunks, rows)

    def _filled(self) -> VectorStore:
        store = self.make()
        self.fill(store, CHUNKS, vectors(0, 1, 2, 3))
        return store

    def test_an_empty_store_answers(self) -> None:
        """With no hits, no sources and a count of 0."""
        store = self.make()
        assert store.count() == 0, "a new store is not empty"
        assert store.search(vectors(0)[0], 3) == [], "an empty store has hits"
        assert store.search_text("tea", 3) == [], "an empty store has hits"
        assert dict(store.sources()) == {}, "an empty store has sources"

    def test_a_hit_is_its_chunk_with_the_cosine(self) -> None:
        """Best first, at most k, and as many as there are."""
        store, query = self._filled(), np.array([0.8, 0.6, 0, 0, 0, 0, 0, 0], np.float32)
        hits = store.search(query, 2)
        assert [h.id for h in hits] == ["tea#0", "tea#9"], f"the two nearest are {[h.id for h in hits]}"
        assert np.allclose([h.score for h in hits], [0.8, 0.6], atol=CLOSE), "a score is not the cosine"
        best, chunk = hits[0], CHUNKS[0]
        assert (best.text, best.source, best.start) == (chunk.text, chunk.source, chunk.start), "a hit is not its chunk"
        assert tuple(best.heading) == chunk.heading, "a hit has another heading than its chunk"
        assert dict(best.metadata) == dict(chunk.metadata), "a hit has other metadata than its chunk"
        assert len(store.search(query, 100)) == len(CHUNKS), "with a large k not every chunk is a hit"

    def test_a_search_by_words_finds_them(self) -> None:
        """In any case of letters. Text that is in no chunk has no hits, and no character is syntax."""
        store = self._filled()
        assert [h.id for h in store.search_text("KITCHEN", 3)] == ["tea#0"], "a word of one chunk does not find it"
        assert store.search_text("xylophone", 3) == [], "a word that no chunk holds has hits"
        for odd in ('"', "a AND (", "*", "", "\ud800"):
            store.search_text(odd, 3)

    def test_a_filter_applies_to_searches_and_counts(self) -> None:
        """Over `source` and metadata, in MongoDB's syntax."""
        store = self._filled()
        expected: list[tuple[dict[str, Any], set[str]]] = [
            ({"source": "tea.md"}, {"tea#0", "tea#9"}),
            ({"year": {"$gte": 2025}}, {"pay#0"}),
            ({"tags": "warm"}, {"tea#0"}),
            ({"$and": [{"year": 2024}, {"source": {"$ne": "cat.md"}}]}, {"tea#0", "tea#9"}),
            ({"source": "none.md"}, set()),
        ]
        for where, ids in expected:
            assert {h.id for h in store.search(vectors(2)[0], 9, where=where)} == ids, f"search(where={where})"
            assert store.count(where) == len(ids), f"count({where})"
        assert store.search_text("wages", 3, where={"source": "tea.md"}) == [], "search_text ignores the filter"

    def test_an_id_that_is_there_is_replaced(self) -> None:
        """Text, vector and metadata."""
        store = self._filled()
        store.upsert([Chunk("tea#0", "Coffee.", "tea.md")], vectors(5))
        assert store.count() == len(CHUNKS), "a chunk was added beside the old one of its id"
        assert store.search(vectors(5)[0], 1)[0].text == "Coffee.", "the old text is found"
        assert store.search_text("kitchen", 3) == [], "the old words are found"

    def test_chunks_are_deleted_by_id_and_by_source(self) -> None:
        """And unknown ids and sources are ignored."""
        store = self._filled()
        store.delete(["pay#0", "nobody#0"])
        assert store.count() == 3, "delete(ids) did not delete one chunk"
        store.remove(["tea.md", "nobody.md"])
        assert store.count() == 1, "remove(sources) did not delete the chunks of one source"
        assert "tea.md" not in store.sources(), "a removed source is listed"
        assert store.search_text("kitchen", 3) == [], "a removed chunk is found by its words"
        assert [h.id for h in store.search(vectors(0)[0], 9)] == ["cat#0"], "a removed chunk is found"

    def test_sources_are_those_that_have_chunks(self) -> None:
        """By name."""
        assert set(self._filled().sources()) == {"tea.md", "pay.md", "cat.md"}, "sources()"

    def test_threads_share_it(self) -> None:
        """Searches while chunks are upserted."""
        store, errors = self.make(), []
        store.upsert(CHUNKS, vectors(0, 1, 2, 3))

        def search() -> None:
            try:
                for _ in range(20):
                    assert store.search(vectors(0)[0], 1)[0].id == "tea#0"
            except Exception as e:
                errors.append(e)

        threads = [threading.Thread(target=search) for _ in range(4)]
        for thread in threads:
            thread.start()
        for i in range(20):
            store.upsert([Chunk(f"new#{i}", "new", "new.md")], vectors(7))
        for thread in threads:
            thread.join()
        assert not errors, f"a search beside an upsert failed: {errors[0]!r}"
        assert store.count({"source": "new.md"}) == 20, "an upsert beside searches is lost"

    def test_another_process_finds_what_is_in(self) -> None:
        """The store of `reopen` has what was upserted."""
        store = self.reopen(self._filled())
        assert store.count() == len(CHUNKS), "what was upserted is not there when the store is opened again"
        assert store.search(vectors(2)[0], 1)[0].id == "pay#0", "what was upserted is not found"


def check_store(make: Callable[[], VectorStore], **attributes: Any) -> None:
    """Run StoreContract against what `make` gives; `attributes` are the contract's.

    Raises:
        AssertionError: a promise is broken.
    """
    check(StoreContract, make, **attributes)
