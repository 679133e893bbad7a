"""The hits of a search: filters, metrics, indexes; and the error for each invalid argument."""

import os
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh.errors import FilterInvalid, StoreError
from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.writer import Replacement


def test_filters_of_every_kind(store: FaissStore, samples: Any) -> None:
    when = datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    rows: list[dict[str, Any]] = [
        {"n": 1, "ok": True, "when": when, "tags": ["a", "b"], "name": "x"},
        {"n": 2.5, "ok": False, "when": datetime(2024, 5, 1, 10), "tags": [], "name": "y"},
        {"n": "two", "name": "z"},
    ]
    store.upsert([Chunk(f"c{i}", "t", "s", 0, (), row) for i, row in enumerate(rows)], samples.vectors(3))
    for _ in range(2):  # from the memtable, then from a merged segment
        for where, ids in [
            ({"n": {"$gt": 0}}, "01"), ({"n": {"$ne": 1}}, "12"), ({"n": {"$in": [1, "two"]}}, "02"),
            ({"n": True}, ""), ({"ok": True}, "0"), ({"ok": 1}, ""), ({"tags": "b"}, "0"), ({"tags": {"$nin": ["a"]}}, "12"),
            ({"tags": {"$exists": True}}, "01"), ({"when": datetime(2024, 5, 1, 10, tzinfo=UTC)}, "01"),
            ({"when": {"$lt": when}}, ""), ({"name": {"$gte": "y"}}, "12"), ({"$not": {"n": {"$gt": 0}}}, "2"),
            ({"$or": [{"name": "x"}, {"n": "two"}]}, "02"), ({"name": "x", "n": {"$gte": 1, "$lte": 1}}, "0"), ({}, "012"),
        ]:  # fmt: skip
            assert "".join(sorted(h.id[1] for h in store.search(samples.vectors(1)[0], 9, where=where))) == ids, where
        assert [c.metadata for c in store.get(["c0", "c1"]) if c][0]["when"] == when
        store.upsert([Chunk("d", "t", "s")], samples.vectors(1))
        store.delete(["d"])
        store.compact(everything=True)


@pytest.mark.parametrize(("where", "sentence"), [
    (lambda row: True, "function"), ({"n": {"$gt": lambda: 1}}, "function"), ({"n": {"$regex": "x"}}, "unknown operator"),
    ({"$ad": []}, "Did you mean '\\$and'"), ({"nn": 1}, "no chunk has a field 'nn'. Did you mean 'n'"),
    ({"n": [1]}, r"\$in"), ({"n": float("nan")}, "nan"), ({"n": {"$in": "abc"}}, "takes a list"), (3, "mapping"),
    ({"n": {}}, "empty"), ({"$and": []}, "list of filters"), ({"n": {"$exists": 1}}, "true or false"), ({1: 2}, "name"),
])  # fmt: skip
def test_an_invalid_filter(store: FaissStore, where: Any, sentence: str, samples: Any) -> None:
    store.upsert(samples.chunks("s", 1, n=1), samples.vectors(1))
    with pytest.raises(FilterInvalid, match=sentence):
        store.search(samples.vectors(1)[0], 1, where=where)


def test_invalid_input_raises_and_changes_nothing(store: FaissStore, samples: Any) -> None:
    samples.fill(store, 1)
    one, bad = samples.chunks("s", 1), samples.vectors(2)
    bad[1, 2] = np.nan
    for sentence, call in [
        ("is twice in one commit", lambda: store.upsert(one * 2, samples.vectors(2))),
        ("source 's' is twice", lambda: store.replace_many([Replacement("s", [], [], "1")] * 2)),
        ("'s#1' contains NaN", lambda: store.upsert(samples.chunks("s", 2), bad)),
        ("is zero", lambda: store.upsert(one, np.zeros((1, samples.d)))),
        ("shape", lambda: store.upsert(one, samples.vectors(2))),
        ("is of source 's', not of 'x'", lambda: store.replace("x", one, samples.vectors(1), digest="1")),
        ("part", lambda: store.replace("s", one, samples.vectors(1), digest="1", part=(0, 2))),
        ("give it a text that is not empty", lambda: store.upsert([Chunk("", "t")], samples.vectors(1))),
        ("does not begin with", lambda: store.upsert(samples.chunks("s", 1, **{"$x": 1}), samples.vectors(1))),
        ("is a dict", lambda: store.upsert(samples.chunks("s", 1, x={}), samples.vectors(1))),
        ("64 bits", lambda: store.upsert(samples.chunks("s", 1, x=2**63), samples.vectors(1))),
        ("is NaN", lambda: store.upsert(samples.chunks("s", 1, x=float("nan")), samples.vectors(1))),
        ("half a surrogate pair", lambda: store.upsert(samples.chunks("s", 1, "\ud800"), samples.vectors(1))),
        ("has no chunk 'no'", lambda: store.set_metadata("no", {})),
        ("has no chunk 'no'", lambda: store.vectors(["no"])),
        ("k is 0", lambda: store.search(samples.vectors(1)[0], 0)),
        ("width 3", lambda: store.search([1, 2, 3], 1)),
        ("vector of the query is zero", lambda: store.search(np.zeros(samples.d), 1)),
        ("vector of the query contains NaN", lambda: store.search([np.nan] * samples.d, 1)),
        ('"cosine" or "l2"', lambda: FaissStore(store.path, metric="dot")),
        ("holds vectors for 'cosine'", lambda: FaissStore(store.path, metric="l2").count()),
    ]:
        with pytest.raises(StoreError, match=sentence):
            call()
    assert (store.version, store.count()) == (1, 3)
    assert len(store.search(samples.vectors(1)[0], 50)) == 3  # k above the number of chunks


def test_l2_ranks_by_distance_and_scores_by_cosine(tmp_path: Path) -> None:
    store = FaissStore(tmp_path / "l2", metric="l2")
    vectors = np.array([[1, 0], [10, 0], [0, 1.2]], np.float32)
    store.upsert([Chunk(f"c{i}", "t") for i in range(3)], vectors)
    hits = store.search([1, 0.1], 3)
    assert [h.id for h in hits] == ["c0", "c2", "c1"]
    assert [h.score for h in hits] == pytest.approx([0.995, 0.0995, 0.995], abs=1e-3)
    assert store.vectors(["c1"]).tolist() == [[10, 0]]


def test_a_large_segment_has_an_index_and_narrow_filters_do_not_use_it(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    n, d = 6000, 16
    centres = rng.standard_normal((60, d))
    vectors = (centres[rng.integers(60, size=n)] + 0.5 * rng.standard_normal((n, d))).astype(np.float32)
    monkeypatch.setattr("agentmesh.rag.store.vector_index.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.store.snapshot.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.store.compaction.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.store.snapshot.EXACT_ROWS", 100)
    rows = [Chunk(f"c{i}", "t", "s", 0, (), {"p": i % 100}) for i in range(n)]
    for first in range(0, n, 2000):
        store.upsert(rows[first : first + 2000], vectors[first : first + 2000])
    store.compact(everything=True)
    assert list(store.stats().indexes.values())[0] > 0
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for share in (100, 50, 30, 10, 2, 1):
        true_hits = 0
        for q in range(40):
            where, query = {"p": {"$lt": share}}, vectors[q] + 0.1
            hits = store.search(query, 10, where=where)
            passing = np.flatnonzero(np.arange(n) % 100 < share)
            nearest = passing[np.argsort(-(unit[passing] @ query))[:10]]
            assert len(hits) == 10
            true_hits += len({f"c{i}" for i in nearest} & {h.id for h in hits})
        assert true_hits >= 0.95 * 400
    index = next((store.path / "g1").glob("*.ivf"))
    os.truncate(index, index.stat().st_size // 2)
    assert len(FaissStore(store.path).search(vectors[0], 10)) == 10  # by exact search
