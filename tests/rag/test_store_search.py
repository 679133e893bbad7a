"""What a search finds: filters, distances, indexes; and the sentence for whatever cannot be asked."""

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


def test_filters_of_every_kind(store: FaissStore, made: Any) -> None:
    when = datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    rows: list[dict[str, Any]] = [
        {"n": 1, "ok": True, "when": when, "tags": ["a", "b"], "name": "x"},
        {"n": 2.5, "ok": False, "when": datetime(2024, 5, 1, 10), "tags": [], "name": "y"},
        {"n": "two", "name": "z"},
    ]
    given = [Chunk(f"c{i}", "t", "s", 0, (), row) for i, row in enumerate(rows)]
    store.upsert(given, made.vectors(3))
    for _ in range(2):  # as it is in memory, then from a merged file
        for where, found in [
            ({"n": {"$gt": 0}}, "01"), ({"n": {"$ne": 1}}, "12"), ({"n": {"$in": [1, "two"]}}, "02"),
            ({"n": True}, ""), ({"ok": True}, "0"), ({"ok": 1}, ""), ({"tags": "b"}, "0"), ({"tags": {"$nin": ["a"]}}, "12"),
            ({"tags": {"$exists": True}}, "01"), ({"when": datetime(2024, 5, 1, 10, tzinfo=UTC)}, "01"),
            ({"when": {"$lt": when}}, ""), ({"name": {"$gte": "y"}}, "12"), ({"$not": {"n": {"$gt": 0}}}, "2"),
            ({"$or": [{"name": "x"}, {"n": "two"}]}, "02"), ({"name": "x", "n": {"$gte": 1, "$lte": 1}}, "0"), ({}, "012"),
        ]:  # fmt: skip
            assert "".join(sorted(h.id[1] for h in store.search(made.vectors(1)[0], 9, where=where))) == found, where
        assert [c.metadata for c in store.get(["c0", "c1"]) if c][0]["when"] == when
        store.upsert([Chunk("d", "t", "s")], made.vectors(1))
        store.delete(["d"])
        store.compact(everything=True)


@pytest.mark.parametrize(("where", "said"), [
    (lambda row: True, "function"), ({"n": {"$gt": lambda: 1}}, "function"), ({"n": {"$regex": "x"}}, "unknown operator"),
    ({"$ad": []}, "Did you mean '\\$and'"), ({"nn": 1}, "no chunk has a field 'nn'. Did you mean 'n'"),
    ({"n": [1]}, r"\$in"), ({"n": float("nan")}, "nan"), ({"n": {"$in": "abc"}}, "takes a list"), (3, "mapping"),
    ({"n": {}}, "empty"), ({"$and": []}, "list of filters"), ({"n": {"$exists": 1}}, "true or false"), ({1: 2}, "name"),
])  # fmt: skip
def test_a_filter_that_cannot_be_understood(store: FaissStore, where: Any, said: str, made: Any) -> None:
    store.upsert(made.chunks("s", 1, n=1), made.vectors(1))
    with pytest.raises(FilterInvalid, match=said):
        store.search(made.vectors(1)[0], 1, where=where)


def test_bad_input_has_its_sentence_and_changes_nothing(store: FaissStore, made: Any) -> None:
    made.fill(store, 1)
    one, bad = made.chunks("s", 1), made.vectors(2)
    bad[1, 2] = np.nan
    for said, call in [
        ("is twice in one commit", lambda: store.upsert(one * 2, made.vectors(2))),
        ("source 's' is twice", lambda: store.replace_many([Replacement("s", [], [], "1")] * 2)),
        ("'s#1' contains NaN", lambda: store.upsert(made.chunks("s", 2), bad)),
        ("is zero", lambda: store.upsert(one, np.zeros((1, made.d)))),
        ("shape", lambda: store.upsert(one, made.vectors(2))),
        ("is of source 's', not of 'x'", lambda: store.replace("x", one, made.vectors(1), digest="1")),
        ("part", lambda: store.replace("s", one, made.vectors(1), digest="1", part=(0, 2))),
        ("give it a text that is not empty", lambda: store.upsert([Chunk("", "t")], made.vectors(1))),
        ("does not begin with", lambda: store.upsert(made.chunks("s", 1, **{"$x": 1}), made.vectors(1))),
        ("is a dict", lambda: store.upsert(made.chunks("s", 1, x={}), made.vectors(1))),
        ("64 bits", lambda: store.upsert(made.chunks("s", 1, x=2**63), made.vectors(1))),
        ("is NaN", lambda: store.upsert(made.chunks("s", 1, x=float("nan")), made.vectors(1))),
        ("half a surrogate pair", lambda: store.upsert(made.chunks("s", 1, "\ud800"), made.vectors(1))),
        ("has no chunk 'no'", lambda: store.set("no", {})),
        ("has no chunk 'no'", lambda: store.vectors(["no"])),
        ("k is 0", lambda: store.search(made.vectors(1)[0], 0)),
        ("width 3", lambda: store.search([1, 2, 3], 1)),
        ("vector of the query is zero", lambda: store.search(np.zeros(made.d), 1)),
        ("vector of the query contains NaN", lambda: store.search([np.nan] * made.d, 1)),
        ('"cosine" or "l2"', lambda: FaissStore(store.path, metric="dot")),
        ("holds vectors for 'cosine'", lambda: FaissStore(store.path, metric="l2").count()),
    ]:
        with pytest.raises(StoreError, match=said):
            call()
    assert (store.version, store.count()) == (1, 3)
    assert len(store.search(made.vectors(1)[0], 50)) == 3  # k above what there is


def test_l2_ranks_by_distance_and_says_the_cosine(tmp_path: Path) -> None:
    store = FaissStore(tmp_path / "l2", metric="l2")
    given = np.array([[1, 0], [10, 0], [0, 1.2]], np.float32)
    store.upsert([Chunk(f"c{i}", "t") for i in range(3)], given)
    hits = store.search([1, 0.1], 3)
    assert [h.id for h in hits] == ["c0", "c2", "c1"]
    assert [h.score for h in hits] == pytest.approx([0.995, 0.0995, 0.995], abs=1e-3)
    assert store.vectors(["c1"]).tolist() == [[10, 0]]


def test_a_large_file_has_an_index_and_narrow_filters_go_round_it(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    n, d = 6000, 16
    centres = rng.standard_normal((60, d))
    given = (centres[rng.integers(60, size=n)] + 0.5 * rng.standard_normal((n, d))).astype(np.float32)
    monkeypatch.setattr("agentmesh.rag.store.vector_index.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.store.snapshot.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.store.compaction.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.store.snapshot.EXACT_ROWS", 100)
    rows = [Chunk(f"c{i}", "t", "s", 0, (), {"p": i % 100}) for i in range(n)]
    for first in range(0, n, 2000):
        store.upsert(rows[first : first + 2000], given[first : first + 2000])
    store.compact(everything=True)
    assert list(store.stats().indexes.values())[0] > 0
    unit = given / np.linalg.norm(given, axis=1, keepdims=True)
    for share in (100, 50, 30, 10, 2, 1):
        good = 0
        for q in range(40):
            where = {"p": {"$lt": share}}
            hits = store.search(given[q] + 0.1, 10, where=where)
            passing = np.flatnonzero(np.arange(n) % 100 < share)
            question = given[q] + 0.1
            best = passing[np.argsort(-(unit[passing] @ question))[:10]]
            assert len(hits) == 10
            good += len({f"c{i}" for i in best} & {h.id for h in hits})
        assert good >= 0.95 * 400
    index = next((store.path / "g1").glob("*.ivf"))
    os.truncate(index, index.stat().st_size // 2)
    assert len(FaissStore(store.path).search(given[0], 10)) == 10  # exactly, then
