"""Commits of a store: total order, atomicity, versions, keys."""

import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh.errors import StoreConflict, StoreError, StoreVersion
from agentmesh.rag import process_cache
from agentmesh.rag.store import compaction, folder, follower, state
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.writer import Replacement
from agentmesh.sized_cache import SizedCache


def test_opening_does_no_io_and_an_empty_store_can_be_searched(store: FaissStore, samples: Any) -> None:
    assert store.search(np.ones(samples.d), 3) == []
    assert (store.count(), store.version, store.sources(), store.get(["a"]), store.ids()) == (0, 0, {}, [None], [])
    assert store.stats().chunks == 0
    assert store.verify() == []
    assert not store.path.exists()


def test_a_late_writer_does_not_overwrite_newer_text(store: FaissStore, samples: Any) -> None:
    store.replace("a", samples.chunks("a", 2, "old"), samples.vectors(2), digest="1", expects="")
    store.replace("a", samples.chunks("a", 2, "new"), samples.vectors(2), digest="2", expects="1")
    with pytest.raises(StoreConflict, match="expected '1', found '2'") as caught:
        store.replace("a", samples.chunks("a", 3, "zombie"), samples.vectors(3), digest="1b", expects="1")
    assert (caught.value.source, caught.value.found) == ("a", "2")
    assert pickle.loads(pickle.dumps(caught.value)).expected == "1"
    assert [c.text for c in store.get(["a#0", "a#1"]) if c] == ["new 0", "new 1"]
    done = store.replace_many(
        [Replacement("a", [], [], "3", "1"), Replacement("b", samples.chunks("b", 1), samples.vectors(1), "1", "")],
        key="k",
    )
    assert (done.refused, done.added) == (("a",), 1)
    repeated = FaissStore(store.path).replace_many([Replacement("b", [], [], "9")], key="k")
    assert (repeated.repeated, repeated.refused, repeated.version) == (True, ("a",), done.version)
    assert store.remove(["a", "b"], expects={"a": "1"}).refused == ("a",)
    assert set(store.sources()) == {"a"}


def test_a_repeated_key_returns_its_first_commit_after_a_merge_too(store: FaissStore, samples: Any) -> None:
    first = store.replace("a", samples.chunks("a", 2), samples.vectors(2), digest="1", key="run/1")
    samples.fill(store, 3)
    refused = store.replace_many([Replacement("a", [], [], "x", "no"), Replacement("c", [], [], "1")], key="run/2")
    assert store.compact(everything=True)
    for one in (store, FaissStore(store.path)):
        repeated = one.replace("a", [], [], digest="2", key="run/1")
        assert (repeated.version, repeated.added, repeated.repeated) == (first.version, 2, True)
        assert one.replace_many([], key="run/2").refused == refused.refused == ("a",)
    assert store.count() == 11


def test_a_document_in_parts_is_hidden_until_the_last(store: FaissStore, samples: Any) -> None:
    store.replace("a", samples.chunks("a", 2, "old"), samples.vectors(2), digest="1")
    new = samples.chunks("a", 4, "new")
    store.replace("a", new[2:], samples.vectors(2), digest="2", part=(2, 2), expects="1")
    assert store.sources()["a"].digest == "1"
    assert {c.text for c in store.get(store.ids()) if c} == {"old 0", "old 1"}
    assert store.stats().pending == 1
    store.compact(everything=True)
    store.replace("a", new[:2], samples.vectors(2), digest="2", part=(1, 2), expects="1", facts={"size": 4})
    assert [c.text for c in store.get([f"a#{i}" for i in range(4)]) if c] == [f"new {i}" for i in range(4)]
    assert (store.sources()["a"].chunks, store.sources()["a"].facts, store.count()) == (4, {"size": 4}, 4)


def test_commits_of_others_are_visible_soon_and_ones_own_at_once(store: FaissStore, samples: Any) -> None:
    other = FaissStore(store.path)
    for n in range(5):
        store.replace(f"s{n}", samples.chunks(f"s{n}", 1), samples.vectors(1, n), digest="1")
        assert store.search(samples.vectors(1, n)[0], 1)[0].source == f"s{n}"
        deadline = time.monotonic() + 0.25
        while other.count() <= n and time.monotonic() < deadline:
            time.sleep(0.001)
        assert other.count() == n + 1


def test_many_threads_and_a_forked_child(store: FaissStore, samples: Any) -> None:
    failed: list[BaseException] = []

    def work(t: int) -> None:
        try:
            for n in range(8):
                store.replace(f"{t}-{n}", samples.chunks(f"{t}-{n}", 2), samples.vectors(2, t), digest="1")
                assert len(store.search(samples.vectors(1, n)[0], 2)) == 2
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (store.version, store.count()) == (32, 64)
    with store._writer.lock:  # held in the parent while it forks, as by another thread
        child = os.fork()
        if not child:
            os._exit(0 if store.count() == 64 and store.replace("c", [], [], digest="1").version == 33 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.version in (32, 33)


def test_versions_of_the_last_hour_and_pinned_ones(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    samples.fill(store, 4)
    pinned = store.pin()
    store.remove(["s0", "s1"])
    store.compact(everything=True)
    assert store.at(3).count() == 9
    assert [h.source for h in store.at(pinned).search(samples.vectors(1, 0)[0], 1)] == ["s0"]
    assert store.at(pinned).bound({"source": "s1"}).count() == 3
    monkeypatch.setattr(folder, "RETIRE_AFTER_S", 0.0)
    later = time.time() + 2 * folder.RETENTION_S
    files = store._writer.folder
    assert files
    files.retire()  # moved aside
    assert store.at(3).count() == 9
    assert FaissStore(store.path).at(pinned).count() == 12
    files.retire(later)  # removed
    assert store.at(pinned).count() == 12
    store.unpin(pinned)
    files.retire(later)
    with pytest.raises(StoreVersion, match="read version 5, the oldest"):
        store.at(pinned)
    with pytest.raises(StoreVersion, match="no version 99 yet"):
        store.at(99)
    with pytest.raises(StoreVersion, match="not pinned"):
        store.unpin(pinned)
    with pytest.raises(StoreError, match="read-only"):
        store.at(5).delete(["s2#0"])
    assert store.count() == 6


def test_a_slow_writer_does_not_take_the_number_of_a_removed_segment(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    samples.fill(store, 2)
    slow_writer = FaissStore(store.path)
    assert slow_writer.version == 2
    samples.fill(store, 4, digest="2")
    store.compact(everything=True)
    monkeypatch.setattr(folder, "RETIRE_AFTER_S", 0.0)
    store._writer.folder.retire()  # type: ignore[union-attr]
    monkeypatch.setattr(follower, "RELIST_AFTER_S", 0.0)  # it paused for a minute
    monkeypatch.setattr(slow_writer._writer, "refresh", lambda: None)  # between its listing and its link
    real = follower.Follower.refresh
    monkeypatch.setattr(folder.Folder, "publish", _resuming(folder.Folder.publish, slow_writer, real))
    assert slow_writer.replace("late", samples.chunks("late", 1), samples.vectors(1), digest="1").version == 7
    time.sleep(follower.POLL_S)
    assert FaissStore(store.path).count() == store.count() == 13


def _resuming(publish: Any, slow_writer: FaissStore, refresh: Any) -> Any:
    def resuming(self: Any, temporary: Path, span: Any) -> bool:
        slow_writer._writer.refresh = lambda: refresh(slow_writer._writer)  # type: ignore[method-assign]
        return bool(publish(self, temporary, span))

    return resuming


def test_a_writer_merges_small_segments_after_a_commit(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    monkeypatch.setattr(compaction, "TAIL_MERGE_FILES", 10)
    samples.fill(store, 25)
    assert len(folder.chain(store._writer.folder.spans())) < 10  # type: ignore[union-attr]
    assert store.count() == 75
    assert store.stats().in_memory <= 30


def test_one_process_merges_at_a_time(store: FaissStore, samples: Any) -> None:
    samples.fill(store, 3)
    files = store._writer.folder
    assert files
    with files.merge_lock() as acquired:
        assert acquired
        assert not FaissStore(store.path).compact(everything=True)
    assert FaissStore(store.path).compact(everything=True)
    assert not FaissStore(store.path).compact(everything=True)


def test_the_store_imports_no_torch_and_no_celery() -> None:
    code = "import sys, agentmesh.rag.store.faiss_store; print([m for m in ('torch', 'celery', 'tantivy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert state.SMALL_ROWS < compaction.WRITER_MERGE_ROWS


def test_the_stores_of_a_process_are_bounded_and_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    cache: SizedCache[Any, FaissStore] = SizedCache("few stores", 210_000, process_cache._store_bytes)
    monkeypatch.setattr(process_cache, "_STORES", cache)
    first = process_cache.store_of(str(tmp_path / "0"))
    for i in range(5):
        store = process_cache.store_of(str(tmp_path / str(i)))
        assert store.memory_bytes == 0
        store.replace("a", samples.chunks("a", 1), samples.vectors(1), digest="d")
        assert store.memory_bytes > 0
        assert process_cache.store_of(str(tmp_path / str(i))) is store
    assert len(cache) == 3
    again = process_cache.store_of(str(tmp_path / "0"))
    assert again is not first
    again.replace("b", samples.chunks("b", 1), samples.vectors(1), digest="e")
    assert first.count() == again.count() == 2  # who still works with the evicted one sees what the new one writes
