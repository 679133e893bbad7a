"""What a store promises of commits: one total order, everything or nothing, versions and keys."""

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
from agentmesh.rag.store import compaction, folder, follower, state
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.writer import Replacement


def test_opening_does_no_io_and_an_empty_store_answers(store: FaissStore, made: Any) -> None:
    assert store.search(np.ones(made.d), 3) == []
    assert (store.count(), store.version, store.sources(), store.get(["a"]), store.ids()) == (0, 0, {}, [None], [])
    assert store.stats().chunks == 0
    assert store.verify() == []
    assert not store.path.exists()


def test_a_zombie_does_not_overwrite_newer_text(store: FaissStore, made: Any) -> None:
    store.replace("a", made.chunks("a", 2, "old"), made.vectors(2), digest="1", expects="")
    store.replace("a", made.chunks("a", 2, "new"), made.vectors(2), digest="2", expects="1")
    with pytest.raises(StoreConflict, match="expected '1', found '2'") as caught:
        store.replace("a", made.chunks("a", 3, "zombie"), made.vectors(3), digest="1b", expects="1")
    assert (caught.value.source, caught.value.found) == ("a", "2")
    assert pickle.loads(pickle.dumps(caught.value)).expected == "1"
    assert [c.text for c in store.get(["a#0", "a#1"]) if c] == ["new 0", "new 1"]
    done = store.replace_many(
        [Replacement("a", [], [], "3", "1"), Replacement("b", made.chunks("b", 1), made.vectors(1), "1", "")], key="k"
    )
    assert (done.refused, done.added) == (("a",), 1)
    again = FaissStore(store.path).replace_many([Replacement("b", [], [], "9")], key="k")
    assert (again.repeated, again.refused, again.version) == (True, ("a",), done.version)
    assert store.remove(["a", "b"], expects={"a": "1"}).refused == ("a",)
    assert set(store.sources()) == {"a"}


def test_a_key_answers_its_first_commit_after_a_merge_too(store: FaissStore, made: Any) -> None:
    first = store.replace("a", made.chunks("a", 2), made.vectors(2), digest="1", key="run/1")
    made.fill(store, 3)
    refused = store.replace_many([Replacement("a", [], [], "x", "no"), Replacement("c", [], [], "1")], key="run/2")
    assert store.compact(everything=True)
    for one in (store, FaissStore(store.path)):
        again = one.replace("a", [], [], digest="2", key="run/1")
        assert (again.version, again.added, again.repeated) == (first.version, 2, True)
        assert one.replace_many([], key="run/2").refused == refused.refused == ("a",)
    assert store.count() == 11


def test_a_document_in_parts_is_hidden_until_the_last(store: FaissStore, made: Any) -> None:
    store.replace("a", made.chunks("a", 2, "old"), made.vectors(2), digest="1")
    new = made.chunks("a", 4, "new")
    store.replace("a", new[2:], made.vectors(2), digest="2", part=(2, 2), expects="1")
    assert store.sources()["a"].digest == "1"
    assert {c.text for c in store.get(store.ids()) if c} == {"old 0", "old 1"}
    assert store.stats().pending == 1
    store.compact(everything=True)
    store.replace("a", new[:2], made.vectors(2), digest="2", part=(1, 2), expects="1", facts={"size": 4})
    assert [c.text for c in store.get([f"a#{i}" for i in range(4)]) if c] == [f"new {i}" for i in range(4)]
    assert (store.sources()["a"].chunks, store.sources()["a"].facts, store.count()) == (4, {"size": 4}, 4)


def test_others_commits_are_seen_and_ones_own_at_once(store: FaissStore, made: Any) -> None:
    other = FaissStore(store.path)
    for n in range(5):
        store.replace(f"s{n}", made.chunks(f"s{n}", 1), made.vectors(1, n), digest="1")
        assert store.search(made.vectors(1, n)[0], 1)[0].source == f"s{n}"
        deadline = time.monotonic() + 0.25
        while other.count() <= n and time.monotonic() < deadline:
            time.sleep(0.001)
        assert other.count() == n + 1


def test_many_threads_and_a_forked_child(store: FaissStore, made: Any) -> None:
    failed: list[BaseException] = []

    def work(t: int) -> None:
        try:
            for n in range(8):
                store.replace(f"{t}-{n}", made.chunks(f"{t}-{n}", 2), made.vectors(2, t), digest="1")
                assert len(store.search(made.vectors(1, n)[0], 2)) == 2
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
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    made.fill(store, 4)
    pinned = store.pin()
    store.remove(["s0", "s1"])
    store.compact(everything=True)
    assert store.at(3).count() == 9
    assert [h.source for h in store.at(pinned).search(made.vectors(1, 0)[0], 1)] == ["s0"]
    assert store.at(pinned).bound({"source": "s1"}).count() == 3
    monkeypatch.setattr(folder, "RETIRE_AFTER_S", 0.0)
    later = time.time() + 2 * folder.RETENTION_S
    files = store._writer.folder
    assert files
    files.retire()  # aside,
    assert store.at(3).count() == 9
    assert FaissStore(store.path).at(pinned).count() == 12
    files.retire(later)  # and gone
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


def test_a_laggard_does_not_take_a_number_that_was_cleaned_away(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    made.fill(store, 2)
    laggard = FaissStore(store.path)
    assert laggard.version == 2
    made.fill(store, 4, digest="2")
    store.compact(everything=True)
    monkeypatch.setattr(folder, "RETIRE_AFTER_S", 0.0)
    store._writer.folder.retire()  # type: ignore[union-attr]
    monkeypatch.setattr(follower, "RELIST_AFTER_S", 0.0)  # it slept for a minute
    monkeypatch.setattr(laggard._writer, "refresh", lambda: None)  # between its listing and its link
    real = follower.Follower.refresh
    monkeypatch.setattr(folder.Folder, "publish", _waking(folder.Folder.publish, laggard, real))
    assert laggard.replace("late", made.chunks("late", 1), made.vectors(1), digest="1").version == 7
    time.sleep(follower.POLL_S)
    assert FaissStore(store.path).count() == store.count() == 13


def _waking(publish: Any, laggard: FaissStore, refresh: Any) -> Any:
    def waking(self: Any, temporary: Path, span: Any) -> bool:
        laggard._writer.refresh = lambda: refresh(laggard._writer)  # type: ignore[method-assign]
        return bool(publish(self, temporary, span))

    return waking


def test_a_writer_merges_its_small_commits_by_the_way(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, made: Any
) -> None:
    monkeypatch.setattr(compaction, "TAIL_MERGE_FILES", 10)
    made.fill(store, 25)
    assert len(folder.chain(store._writer.folder.spans())) < 10  # type: ignore[union-attr]
    assert store.count() == 75
    assert store.stats().in_memory <= 30


def test_two_compactors_do_not_meet(store: FaissStore, made: Any) -> None:
    made.fill(store, 3)
    files = store._writer.folder
    assert files
    with files.merge_lock() as mine:
        assert mine
        assert not FaissStore(store.path).compact(everything=True)
    assert FaissStore(store.path).compact(everything=True)
    assert not FaissStore(store.path).compact(everything=True)


def test_the_store_imports_no_torch_and_no_celery() -> None:
    code = "import sys, agentmesh.rag.store.faiss_store; print([m for m in ('torch', 'celery', 'tantivy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert state.SMALL_ROWS < compaction.WRITER_MERGE_ROWS
