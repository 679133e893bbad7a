"""A store against a dict as its oracle: random commits, parts, merges and re-embedding."""

import random
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh.errors import FilterInvalid, StoreConflict
from agentmesh.rag.documents import Chunk
from agentmesh.rag.store import compaction, state
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.filters import conditions, matches, parse_filter
from agentmesh.rag.store.follower import POLL_S

D = 8
FILTERS: list[dict[str, Any]] = [
    {"n": {"$gte": 3}}, {"tags": "a"}, {"tags": {"$nin": ["a", "b"]}}, {"tenant": {"$ne": "x"}},
    {"$or": [{"tenant": "x"}, {"n": {"$lt": 2}}]}, {"tenant": {"$exists": False}}, {"source": {"$in": ["s1", "s2"]}},
    {"n": {"$not": {"$in": [1, 2]}}}, {"ok": True},
]  # fmt: skip


class Oracle:
    """What a store should hold, in a dict."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.rows: dict[str, tuple[Chunk, np.ndarray]] = {}
        self.digests: dict[str, str] = {}
        self.parts: dict[str, tuple[str, int, dict[int, list[tuple[Chunk, np.ndarray]]]]] = {}
        self.written = 0

    def chunks(self, source: str, n: int) -> tuple[list[Chunk], np.ndarray]:
        out = []
        self.written += 1
        for i in self.rng.sample(range(40), n):
            self.written += 1
            fields: dict[str, Any] = {"n": self.rng.choice([0, 1, 2.5, 3, 9]), "ok": self.rng.random() < 0.5}
            if self.rng.random() < 0.6:
                fields["tenant"] = self.rng.choice(["x", "y"])
            if self.rng.random() < 0.7:
                fields["tags"] = self.rng.sample(["a", "b", "c"], self.rng.randrange(3))
            out.append(Chunk(f"{source}#{i}", f"{self.written} ünï", source, i, ("h", str(i)), fields))
        vectors = np.array([[self.rng.gauss(0, 1) for _ in range(D)] for _ in out], np.float32).reshape(-1, D)
        return out, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def drop(self, source: str) -> None:
        self.rows = {i: row for i, row in self.rows.items() if row[0].source != source}

    def put(self, chunks: list[Chunk], vectors: np.ndarray) -> None:
        for chunk, vector in zip(chunks, vectors, strict=True):
            self.rows.pop(chunk.id, None)
            self.rows[chunk.id] = (chunk, vector)

    def step(self, store: FaissStore) -> None:
        source = f"s{self.rng.randrange(6)}"
        what = self.rng.choice(["replace"] * 4 + ["part"] * 4 + ["upsert"] * 2 + ["delete", "remove", "set"])
        if what == "replace":
            chunks, vectors = self.chunks(source, self.rng.randrange(8))
            digest = f"d{self.written}"
            if self.rng.random() < 0.2:
                if self.digests.get(source, "") != "stale":
                    with pytest.raises(StoreConflict):
                        store.replace(source, chunks, vectors, digest=digest, expects="stale")
                return
            done = store.replace(
                source, chunks, vectors, digest=digest, expects=self.digests.get(source, ""), key=digest
            )
            before = len(self.rows)
            self.drop(source)
            self.put(chunks, vectors)
            assert done.removed - done.added == before - len(self.rows)
            assert store.replace(source, [], [], digest="other", key=digest).repeated
            self.digests[source] = digest
            self.parts.pop(source, None)
        elif what == "part":
            self.part(store, source)
        elif what == "upsert":
            chunks, vectors = self.chunks(source, 3)
            store.upsert(chunks, vectors)
            self.put(chunks, vectors)
        elif what == "delete" and self.rows:
            ids = self.rng.sample(sorted(self.rows), min(3, len(self.rows)))
            assert store.delete(ids).removed == len(ids)
            for i in ids:
                del self.rows[i]
        elif what == "remove":
            store.remove([source])
            self.drop(source)
            self.digests.pop(source, None)
            self.parts.pop(source, None)
        elif what == "set" and self.rows:
            i = self.rng.choice(sorted(self.rows))
            c, vector = self.rows.pop(i)
            store.set_metadata(i, {"n": 9, "new": "z"})
            self.rows[i] = (Chunk(c.id, c.text, c.source, c.start, c.heading, {"n": 9, "new": "z"}), vector)

    def part(self, store: FaissStore, source: str) -> None:
        if source not in self.parts or self.rng.random() < 0.1:
            self.parts[source] = (f"p{self.written}", 3, {})
        digest, of, have = self.parts[source]
        number = self.rng.choice([p for p in range(1, of + 1) if p not in have])
        chunks, vectors = self.chunks(source, 2)
        committed = {c.id for rows in have.values() for c, _ in rows}
        new = [i for i, c in enumerate(chunks) if c.id not in committed]
        chunks, vectors = [chunks[i] for i in new], vectors[new]
        store.replace(source, chunks, vectors, digest=digest, part=(number, of))
        have[number] = list(zip(chunks, vectors, strict=True))
        if len(have) == of:
            self.drop(source)
            for p in sorted(have):
                self.put([c for c, _ in have[p]], np.array([v for _, v in have[p]]).reshape(-1, D))
            self.digests[source] = digest
            del self.parts[source]

    def check(self, store: FaissStore) -> None:
        assert {i: c for i, (c, _) in self.rows.items()} == {c.id: c for c in store.get(store.ids()) if c}
        assert {s: f.digest for s, f in store.sources().items()} == self.digests
        query = np.array([self.rng.gauss(0, 1) for _ in range(D)], np.float32)
        query /= np.linalg.norm(query)
        for words in [None, self.rng.choice(FILTERS)]:
            if words and not self.rows:
                continue
            where = parse_filter(words or {})
            passing = {i: v for i, (c, v) in self.rows.items() if matches(where, {"source": c.source, **c.metadata})}
            scores = {i: float(v @ query) for i, v in passing.items()}
            try:
                hits = store.search(query, 5, where=words)
            except FilterInvalid:
                fields = {field for c, _ in self.rows.values() for field in c.metadata}
                assert {t.field for t in conditions(where)} - fields
                continue
            best = sorted(scores.values(), reverse=True)[:5]
            assert [h.score for h in hits] == pytest.approx(best, abs=1e-5)
            assert [scores[h.id] for h in hits] == pytest.approx(best, abs=1e-5)
            assert store.count(words) == len(passing)


@pytest.mark.parametrize("seed", range(8))
def test_a_store_is_a_dict_with_a_search(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SMALL_ROWS", 6)  # so that commits become large segments too
    monkeypatch.setattr(compaction, "SMALL_ROWS", 6)
    monkeypatch.setattr(compaction, "TAIL_MERGE_FILES", 9)
    oracle, store, beside = Oracle(seed), FaissStore(tmp_path / "kb"), FaissStore(tmp_path / "kb")
    for n in range(60):
        oracle.step(store)
        if n % 7 == 0:
            oracle.check(store)
        if n % 20 == 13:
            store.compact(everything=seed % 2 == 0)
            oracle.check(store)
            oracle.check(FaissStore(tmp_path / "kb"))
    beside._writer._refreshed = float("-inf")
    for one in (store, beside, FaissStore(tmp_path / "kb")):
        oracle.check(one)
    assert store.verify() == []


def other_embedder(texts: Sequence[str]) -> np.ndarray:
    """A fixed random vector for each text."""
    seeds = [int.from_bytes(text.encode()[:8], "big") for text in texts]
    vectors = np.array([np.random.default_rng(s).standard_normal(D) for s in seeds], np.float32).reshape(-1, D)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_store_is_reembedded_while_others_write(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "SMALL_ROWS", 6)
    monkeypatch.setattr(compaction, "SMALL_ROWS", 6)
    monkeypatch.setattr("agentmesh.rag.store.reembed.EMBED_BATCH", 5)
    oracle, writer = Oracle(seed), FaissStore(tmp_path / "kb")
    for n in range(30):
        oracle.step(writer)
        if n == 20:
            writer.compact()
    steps = iter(range(12))

    def embed(texts: Sequence[str]) -> np.ndarray:
        for n in islice(steps, oracle.rng.randrange(4)):
            oracle.step(writer)
            if n % 4 == 1:
                writer.compact(everything=n > 6)
        return other_embedder(texts)

    FaissStore(tmp_path / "kb").reembed(embed, d=D)
    oracle.rows = {i: (c, other_embedder([c.text])[0]) for i, (c, _) in oracle.rows.items()}
    for _, _, have in oracle.parts.values():
        for p, rows in have.items():
            have[p] = [(c, other_embedder([c.text])[0]) for c, _ in rows]
    time.sleep(POLL_S)
    for one in (writer, FaissStore(tmp_path / "kb")):
        oracle.check(one)
    for _ in range(10):
        oracle.step(writer)
    assert writer.compact(everything=True)
    oracle.check(writer)
    assert writer.stats().generation == "g2"
