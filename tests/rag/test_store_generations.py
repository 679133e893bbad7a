"""A store and its embedder: another one is refused, until a generation with its vectors replaces the old one."""

import time
from typing import Any

import numpy as np
import pytest

from agentmesh.errors import EmbedderMismatch
from agentmesh.rag.embedders.base import Identity
from agentmesh.rag.store import folder, follower
from agentmesh.rag.store.faiss_store import FaissStore


def test_another_embedder_is_refused(store: FaissStore, samples: Any) -> None:
    one = Identity("one", d=samples.d, probe=tuple(np.eye(samples.d)[0]))
    FaissStore(store.path, identity=one).replace("a", samples.chunks("a", 1), samples.vectors(1), digest="1")
    assert store.identity == one
    assert FaissStore(store.path, identity=one).count() == 1
    with pytest.raises(EmbedderMismatch):
        FaissStore(store.path, identity=Identity("two", d=samples.d, probe=tuple(np.eye(samples.d)[1]))).count()
    with pytest.raises(EmbedderMismatch, match="width 8"):
        FaissStore(store.path, identity=Identity("three", d=4)).count()
    with pytest.raises(EmbedderMismatch, match="width 8"):
        store.replace("b", samples.chunks("b", 1), np.ones((1, 4)), digest="1")


def test_a_generation_with_another_embedder_replaces_the_old_one(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    samples.fill(store, 6)
    store.delete(["s1#0"])
    store.replace("p", samples.chunks("p", 2)[:1], samples.vectors(1), digest="1", part=(1, 2), key="p/1")
    store.replace("q", samples.chunks("q", 2)[:1], samples.vectors(1), digest="1", part=(1, 2))
    calls, progress = 0, []

    def embed(texts: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt  # killed halfway
        if calls == 3:  # another writer commits meanwhile
            writer.replace("s0", samples.chunks("s0", 1, "newer"), samples.vectors(1), digest="2", expects="1")
            writer.remove(["s2"])
            writer.set_metadata("s3#0", {"n": 1})
            writer.replace("p", samples.chunks("p", 2)[1:], samples.vectors(1), digest="1", part=(2, 2))
            writer.compact(everything=True)
        return np.array([[len(t), 1, 2] for t in texts], np.float32)

    writer, reader = FaissStore(store.path), FaissStore(store.path)
    monkeypatch.setattr("agentmesh.rag.store.reembed.EMBED_BATCH", 4)
    assert reader.count() == 17
    with pytest.raises(KeyboardInterrupt):
        store.reembed(embed, d=3)
    version = store.reembed(embed, identity=Identity("new", d=3), progress=lambda a, b: progress.append((a, b)))
    assert progress[-1][0] == progress[-1][1]
    for one in (store, reader, writer, FaissStore(store.path)):
        time.sleep(follower.POLL_S)
        assert one.version == version
        assert one.stats().generation == "g2"
        assert sorted(one.sources()) == ["p", "s0", "s1", "s3", "s4", "s5"]
        assert sorted(c.text for c in one.get(["s0#0", "p#0", "p#1"]) if c) == ["newer 0", "text 0", "text 1"]
        assert (one.count(), one.count({"n": 1}), one.get(["s1#0"])) == (14, 1, [None])
        assert len(one.search([5, 1, 2], 20)) == 14
    assert store.replace("p", [], [], digest="9", key="p/1").repeated
    with pytest.raises(EmbedderMismatch):
        writer.replace("z", samples.chunks("z", 1), samples.vectors(1), digest="1")
    writer.replace("q", samples.chunks("q", 2)[1:], np.ones((1, 3)), digest="1", part=(2, 2))
    time.sleep(follower.POLL_S)
    assert store.bound({"source": "q"}).count() == 2
    assert store.verify() == []
    monkeypatch.setattr(folder, "RETENTION_S", 0.0)
    folder.drop_generations(store.path, "g2", 0.0)
    assert not (store.path / "g1").exists()
    reader._writer._refreshed = float("-inf")
    assert reader.bound({"source": "q"}).count() == 2


def test_a_reader_follows_to_another_embedder_and_back(store: FaissStore, samples: Any) -> None:
    """A reader for embedder `a` survives re-embedding to `b` and back, and fails when the store stays with `b`."""
    a, b = Identity("a", d=3, probe=(1.0, 0.0, 0.0)), Identity("b", d=3, probe=(0.0, 1.0, 0.0))

    def embed(texts: Any) -> np.ndarray:
        return np.array([[len(t), 1, 2] for t in texts], np.float32)

    FaissStore(store.path, identity=a).replace("s", samples.chunks("s", 2), embed(["x", "y"]), digest="1")
    reader = FaissStore(store.path, identity=a)
    assert reader.count() == 2
    store.reembed(embed, identity=b)
    store.reembed(embed, identity=a)
    time.sleep(follower.POLL_S)
    assert (reader.count(), reader.stats().generation) == (2, "g3")
    store.reembed(embed, identity=b)
    time.sleep(follower.POLL_S)
    for _ in range(2):
        with pytest.raises(EmbedderMismatch):
            reader.count()
