"""Full-text search: any language, punctuation and filter; the same results however the rows are spread over segments."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentmesh import StoreError
from agentmesh.rag.documents import Chunk
from agentmesh.rag.embedders import embedder
from agentmesh.rag.ranking import mmr, rrf
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.text_index import TextIndex, build_text_index, space_out, terms, weigh

D = 8


def unit(n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def filled(path: Path, texts: list[str], commits: int = 1, **metadata: list) -> FaissStore:
    store = FaissStore(path)
    chunks = [Chunk(f"c{i:05}", t, "s", metadata={k: v[i] for k, v in metadata.items()}) for i, t in enumerate(texts)]
    vectors = unit(len(texts))
    for part in np.array_split(np.arange(len(texts)), commits):
        store.upsert([chunks[i] for i in part], vectors[part])
    return store


def search_ids(store: FaissStore, query: str, k: int = 10, **options: object) -> list[str]:
    return [h.id for h in store.search_text(query, k, **options)]


def test_words_of_many_languages(tmp_path: Path) -> None:
    texts = [
        "The cats sleep.", "机器学习是人工智能的一个分支", "Straße und Café, naïve", "как поживаете",
        "C++ and how to use it", "도서관에서 책을", "猫", "ระบบค้นหา",
    ]  # fmt: skip
    store = filled(tmp_path, texts)
    for query, first in (
        ("cat", 0), ("CATS?", 0), ("学习", 1), ("智能", 1), ("strasse cafe", 2), ("поживаете", 3), ("C++: how?", 4),
        ("도서관", 5), ("猫", 6), ("ค้นหา", 7),
    ):  # fmt: skip
        assert search_ids(store, query)[:1] == [f"c{first:05}"], query
    for query in ("", "   ", '!!! ( " * : ^ ~ \\', "\0", "zebra", "ab" * 500, "a\ud800b"):
        assert search_ids(store, query) == []


def test_terms_of_a_query() -> None:
    assert terms("cats cat CAT") == ["cat"]
    assert terms("How do I retry the runs?") == ["retri", "run"]
    assert terms("who are we") == ["who", "are", "we"]
    assert len(terms(" ".join(f"w{i}" for i in range(1000)))) == 256
    assert space_out("plain") == "plain"


def test_a_word_weighs_by_all_rows_not_by_its_own_segment(tmp_path: Path) -> None:
    # every row of the last segment has the word `rare`: by this segment alone it would weigh nothing
    texts = ["common words here"] * 2400 + ["rare words here"] * 1200
    store = filled(tmp_path, texts, commits=3)
    first = store.search_text("common rare", 1)[0]
    assert first.text == "rare words here"
    rng = np.random.default_rng(1)
    texts = [" ".join(f"word{min(299, j)}" for j in rng.zipf(1.3, 12)) for _ in range(3000)]
    one, many = filled(tmp_path / "one", texts), filled(tmp_path / "many", texts, commits=7)
    for query in ("word2 word40", "word100", "word5 word6 word7"):
        a, b = one.search_text(query, 20), many.search_text(query, 20)
        # only the average length of a row differs between segments
        assert np.allclose([h.score for h in a], [h.score for h in b], rtol=0.05)


def test_filters_and_removed_rows(tmp_path: Path) -> None:
    n = 6000
    texts = ["tea " * (1 + i % 7) + "time" for i in range(n)]
    store = filled(tmp_path, texts, commits=3, team=["a" if i % 1000 == 0 else "b" for i in range(n)], n=list(range(n)))
    assert search_ids(store, "tea", where={"team": "a"}) == sorted(
        search_ids(store, "tea", where={"team": "a"}), key=lambda i: (-texts[int(i[1:])].count("tea"), i)
    )
    assert len(search_ids(store, "tea", where={"team": "a"})) == 6
    assert len(search_ids(store, "tea", where={"n": {"$gte": 3000}})) == 10
    # many pass, but none of those that the query likes best
    liked = [i for i, t in enumerate(texts) if t.count("tea") == 7]
    store.delete([f"c{i:05}" for i in liked])
    hits = search_ids(store, "tea", k=50)
    assert len(hits) == 50
    assert all(texts[int(i[1:])].count("tea") == 6 for i in hits)
    bound = store.bound({"team": "a"})
    assert len(search_ids(bound, "tea", k=50)) == 6 - sum(i % 1000 == 0 for i in liked)
    assert search_ids(bound, "tea", where={"team": "b"}) == []
    with pytest.raises(StoreError, match="k is 0"):
        store.search_text("tea", 0)


def test_what_is_added_is_found_at_once(tmp_path: Path) -> None:
    store = filled(tmp_path, ["first"])
    for i in range(30):
        store.upsert([Chunk(f"n{i}", f"number{i} thing", "s")], unit(1, i))
        assert search_ids(store, f"number{i}") == [f"n{i}"]
    assert len(search_ids(store, "things", k=100)) == 30
    store.upsert([Chunk("n3", "another", "s")], unit(1))
    assert search_ids(store, "number3") == []
    assert search_ids(store.at(5), "number3") == ["n3"]


def test_hybrid_finds_by_word_and_by_meaning(tmp_path: Path) -> None:
    wordllama = embedder()
    texts = [
        "Parental leave lasts twelve weeks.",
        "Error code E4711 means the pump is dry.",
        "The office closes at six.",
        "Mothers and fathers may stay at home.",
    ]
    store = FaissStore(tmp_path, identity=wordllama.identity)
    store.upsert([Chunk(f"c{i}", t, "s") for i, t in enumerate(texts)], wordllama.documents(texts))
    query = "what does E4711 mean for fathers"
    hits = store.search_hybrid(query, wordllama.query(query), 3)
    assert {h.id for h in hits[:2]} == {"c1", "c3"}
    vectors = wordllama.documents([h.text for h in hits])
    assert np.allclose(
        [h.score for h in hits], vectors @ wordllama.query(query), atol=1e-5
    )  # the cosine, in every mode
    assert np.allclose(
        [h.score for h in store.search_text(query, 3, vector=wordllama.query(query))],
        [float(wordllama.query(query) @ wordllama.documents([h.text])[0]) for h in store.search_text(query, 3)],
        atol=1e-5,
    )
    assert [h.id for h in store.search_hybrid("???", wordllama.query(query), 4)] == [
        h.id for h in store.search(wordllama.query(query), 4)
    ]


def test_an_index_in_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a.text"
    folder.mkdir()
    build_text_index(folder, ((i, f"word{i} same") for i in range(100)))
    assert not [f for f in os.listdir(folder) if f.endswith(".lock")]
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    folder.chmod(0o500)
    index = TextIndex.open(folder)
    weights = weigh(terms("word7"), [index])
    assert [row for row, _ in index.search(weights, 10)] == [7]
    assert index.n == 100
    assert len(index.search(weigh(["same"], [index]), 1000)) == 100
    assert index.search(weigh(["same"], [index]), 10, among=[5, 50])[1][0] == 50
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()} == before
    folder.chmod(0o700)
    moved = tmp_path / "b.text"
    shutil.copytree(folder, moved)
    index = TextIndex.open(moved)
    shutil.rmtree(moved)  # as merging does it, behind a reader
    assert len(index.search(weigh(["same"], [index]), 1000)) == 100
    assert [row for row, _ in index.search(weigh(terms("word7"), [index]), 10)] == [7]
    (folder / "meta.json").write_text("{")
    with pytest.raises((OSError, ValueError)):
        TextIndex.open(folder)


def test_a_damaged_index_is_rebuilt_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path, [f"word{i}" for i in range(1500)])
    (segment,) = tmp_path.rglob("*.seg")
    folder = segment.with_suffix(".text")
    folder.mkdir()
    (folder / "meta.json").write_text("no")
    assert search_ids(store, "word7") == ["c00007"]
    assert "indexed in memory" in caplog.text


def test_merging_writes_an_index_beside_the_segment(tmp_path: Path) -> None:
    store = filled(tmp_path, [f"word{i} all" for i in range(6000)], commits=4)
    store.delete(["c00007"])
    before = store.search_text("all", 6000)
    assert store.compact(everything=True)
    (folder,) = tmp_path.rglob("*.text")
    assert TextIndex.open(folder).n == 5999
    reopened = FaissStore(tmp_path)
    assert search_ids(reopened, "word8") == ["c00008"]
    assert search_ids(reopened, "word7") == []
    assert [h.id for h in reopened.search_text("all", 6000)] == [h.id for h in before]


def test_a_forked_child_searches(tmp_path: Path) -> None:
    store = filled(tmp_path, [f"word{i}" for i in range(1500)])
    assert search_ids(store, "word7") == ["c00007"]
    code = f"""
import os, sys
from agentmesh.rag.store.faiss_store import FaissStore
store = FaissStore({str(tmp_path)!r})
assert store.search_text("word7", 1)[0].id == "c00007"
pid = os.fork()
if not pid:
    os._exit(0 if store.search_text("word8", 1)[0].id == "c00008" else 1)
assert os.waitpid(pid, 0)[1] == 0
assert store.search_text("word9", 1)[0].id == "c00009"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=30)


def test_ranks_are_fused_and_ties_go_by_id() -> None:
    fused = rrf([["b", "a"], ["a", "b"]])
    assert [i for i, _ in fused] == ["a", "b"]
    assert fused[0][1] == fused[1][1] == 1 / 61 + 1 / 62


def test_maximal_marginal_relevance() -> None:
    query = np.array([1, 0], np.float32)
    vectors = np.array([[1, 0], [0.999, 0.04], [0.6, 0.8], [0, 1]], np.float32)
    assert mmr(query, vectors, 2, relevance=1.0) == [0, 1]
    assert mmr(query, vectors, 3, relevance=0.5)[0] == 0
    assert 1 not in mmr(query, vectors, 2, relevance=0.3)
    assert sorted(mmr(query, vectors, 10)) == [0, 1, 2, 3]
    assert mmr(query, vectors[:0], 2) == []
