"""What a store promises: one total order, everything or nothing, a sentence for whatever cannot be."""

import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh.errors import (
    EmbedderMismatch,
    FilterInvalid,
    StoreConflict,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreVersion,
)
from agentmesh.rag import compact, folder, follow, state
from agentmesh.rag.chunk import Chunk
from agentmesh.rag.embedder import Identity
from agentmesh.rag.packing import Replacement
from agentmesh.rag.store import FaissStore

D = 8


def chunks(source: str, n: int, text: str = "text", /, **fields: Any) -> list[Chunk]:
    return [Chunk(f"{source}#{i}", f"{text} {i}", source, 10 * i, ("Title",), fields) for i in range(n)]


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


def fill(store: FaissStore, sources: int, n: int = 3, digest: str = "1", **fields: Any) -> None:
    for s in range(sources):
        store.replace(f"s{s}", chunks(f"s{s}", n, f"s{s}", **fields), vectors(n, s), digest=digest)


@pytest.fixture
def store(tmp_path: Path) -> FaissStore:
    return FaissStore(tmp_path / "kb")


def test_opening_does_no_io_and_an_empty_store_answers(store: FaissStore) -> None:
    assert store.search(np.ones(D), 3) == []
    assert (store.count(), store.version, store.sources(), store.get(["a"]), store.ids()) == (0, 0, {}, [None], [])
    assert store.stats().chunks == 0
    assert store.verify() == []
    assert not store.path.exists()


def test_a_zombie_does_not_overwrite_newer_text(store: FaissStore) -> None:
    store.replace("a", chunks("a", 2, "old"), vectors(2), digest="1", expects="")
    store.replace("a", chunks("a", 2, "new"), vectors(2), digest="2", expects="1")
    with pytest.raises(StoreConflict, match="expected '1', found '2'") as caught:
        store.replace("a", chunks("a", 3, "zombie"), vectors(3), digest="1b", expects="1")
    assert (caught.value.source, caught.value.found) == ("a", "2")
    assert pickle.loads(pickle.dumps(caught.value)).expected == "1"
    assert [c.text for c in store.get(["a#0", "a#1"]) if c] == ["new 0", "new 1"]
    done = store.replace_many(
        [Replacement("a", [], [], "3", "1"), Replacement("b", chunks("b", 1), vectors(1), "1", "")], key="k"
    )
    assert (done.refused, done.added) == (("a",), 1)
    again = FaissStore(store.path).replace_many([Replacement("b", [], [], "9")], key="k")
    assert (again.again, again.refused, again.version) == (True, ("a",), done.version)
    assert store.remove(["a", "b"], expects={"a": "1"}).refused == ("a",)
    assert set(store.sources()) == {"a"}


def test_a_key_answers_its_first_commit_after_a_merge_too(store: FaissStore) -> None:
    first = store.replace("a", chunks("a", 2), vectors(2), digest="1", key="run/1")
    fill(store, 3)
    refused = store.replace_many([Replacement("a", [], [], "x", "no"), Replacement("c", [], [], "1")], key="run/2")
    assert store.compact(everything=True)
    for one in (store, FaissStore(store.path)):
        again = one.replace("a", [], [], digest="2", key="run/1")
        assert (again.version, again.added, again.again) == (first.version, 2, True)
        assert one.replace_many([], key="run/2").refused == refused.refused == ("a",)
    assert store.count() == 11


def test_a_document_in_parts_is_hidden_until_the_last(store: FaissStore) -> None:
    store.replace("a", chunks("a", 2, "old"), vectors(2), digest="1")
    new = chunks("a", 4, "new")
    store.replace("a", new[2:], vectors(2), digest="2", part=(2, 2), expects="1")
    assert store.sources()["a"].digest == "1"
    assert {c.text for c in store.get(store.ids()) if c} == {"old 0", "old 1"}
    assert store.stats().pending == 1
    store.compact(everything=True)
    store.replace("a", new[:2], vectors(2), digest="2", part=(1, 2), expects="1", facts={"size": 4})
    assert [c.text for c in store.get([f"a#{i}" for i in range(4)]) if c] == [f"new {i}" for i in range(4)]
    assert (store.sources()["a"].chunks, store.sources()["a"].facts, store.count()) == (4, {"size": 4}, 4)


def test_others_commits_are_seen_and_ones_own_at_once(store: FaissStore) -> None:
    other = FaissStore(store.path)
    for n in range(5):
        store.replace(f"s{n}", chunks(f"s{n}", 1), vectors(1, n), digest="1")
        assert store.search(vectors(1, n)[0], 1)[0].source == f"s{n}"
        deadline = time.monotonic() + 0.25
        while other.count() <= n and time.monotonic() < deadline:
            time.sleep(0.001)
        assert other.count() == n + 1


def test_many_threads_and_a_forked_child(store: FaissStore) -> None:
    failed: list[BaseException] = []

    def work(t: int) -> None:
        try:
            for n in range(8):
                store.replace(f"{t}-{n}", chunks(f"{t}-{n}", 2), vectors(2, t), digest="1")
                assert len(store.search(vectors(1, n)[0], 2)) == 2
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert (store.version, store.count()) == (32, 64)
    with store._core.lock:  # held in the parent while it forks, as by another thread
        child = os.fork()
        if not child:
            os._exit(0 if store.count() == 64 and store.replace("c", [], [], digest="1").version == 33 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.version in (32, 33)


def test_versions_of_the_last_hour_and_pinned_ones(store: FaissStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, 4)
    pinned = store.pin()
    store.remove(["s0", "s1"])
    store.compact(everything=True)
    assert store.at(3).count() == 9
    assert [h.source for h in store.at(pinned).search(vectors(1, 0)[0], 1)] == ["s0"]
    assert store.at(pinned).bound({"source": "s1"}).count() == 3
    monkeypatch.setattr(folder, "STAY_S", 0.0)
    later = time.time() + 2 * folder.KEEP_S
    files = store._core.folder
    assert files
    files.retire()  # aside,
    assert store.at(3).count() == 9
    assert FaissStore(store.path).at(pinned).count() == 12
    files.retire(later)  # and gone
    assert store.at(pinned).count() == 12
    store.unpin(pinned)
    files.retire(later)
    with pytest.raises(StoreVersion, match="the oldest is 5"):
        store.at(pinned)
    with pytest.raises(StoreVersion, match="no version 99 yet"):
        store.at(99)
    with pytest.raises(StoreVersion, match="not pinned"):
        store.unpin(pinned)
    with pytest.raises(StoreError, match="for reading"):
        store.at(5).delete(["s2#0"])
    assert store.count() == 6


def test_a_laggard_does_not_take_a_number_that_was_cleaned_away(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, 2)
    laggard = FaissStore(store.path)
    assert laggard.version == 2
    fill(store, 4, digest="2")
    store.compact(everything=True)
    monkeypatch.setattr(folder, "STAY_S", 0.0)
    store._core.folder.retire()  # type: ignore[union-attr]
    monkeypatch.setattr(follow, "FRESH_S", 0.0)  # it slept for a minute
    monkeypatch.setattr(laggard._core, "refresh", lambda: None)  # between its listing and its link
    real = follow.Follower.refresh
    monkeypatch.setattr(folder.Folder, "publish", _waking(folder.Folder.publish, laggard, real))
    assert laggard.replace("late", chunks("late", 1), vectors(1), digest="1").version == 7
    time.sleep(follow.POLL_S)
    assert FaissStore(store.path).count() == store.count() == 13


def _waking(publish: Any, laggard: FaissStore, refresh: Any) -> Any:
    def waking(self: Any, temporary: Path, span: Any) -> bool:
        laggard._core.refresh = lambda: refresh(laggard._core)  # type: ignore[method-assign]
        return bool(publish(self, temporary, span))

    return waking


def test_a_writer_merges_its_small_commits_by_the_way(store: FaissStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "TAIL_FILES", 10)
    fill(store, 25)
    assert len(folder.chain(store._core.folder.spans())) < 10  # type: ignore[union-attr]
    assert store.count() == 75
    assert store.stats().in_memory <= 30


def test_a_damaged_file_is_named_and_the_rest_is_read(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, 3)
    files = store._core.folder
    assert files
    second, third = files.file((2, 2)), files.file((3, 3))
    data = bytearray(second.read_bytes())
    data[80] ^= 1
    second.write_bytes(data)
    os.truncate(third, third.stat().st_size - 1)
    fresh = FaissStore(store.path)
    assert {h.source for h in fresh.search(vectors(1)[0], 9)} == {"s0"}
    assert fresh.stats().damaged == (second.name, third.name)
    assert [m for m in caplog.messages if "is searched without it" in m]
    problems = fresh.verify()
    assert len(problems) == 2
    assert second.name in problems[0]
    assert "bytes of" in problems[1]
    with pytest.raises(StoreDamaged, match=second.name):
        fresh.compact(everything=True)
    fresh.replace("s1", chunks("s1", 3), vectors(3), digest="1")  # the mend
    assert fresh.count() == 6
    second.unlink()
    assert "is missing" in FaissStore(store.path).verify()[0]
    assert FaissStore(store.path).count() == 6


def test_a_large_truncated_file_is_found_before_it_is_mapped(store: FaissStore) -> None:
    big = [Chunk(f"b#{i}", "x" * 2000, "b", i) for i in range(3000)]
    store.upsert(big, vectors(3000))
    fill(store, 1)
    path = store._core.folder.file((1, 1))  # type: ignore[union-attr]
    assert path.stat().st_size > 4 << 20
    os.truncate(path, path.stat().st_size // 2)
    fresh = FaissStore(store.path)
    assert fresh.count() == 3
    assert fresh.stats().damaged == (path.name,)


def test_a_full_disk_is_a_sentence_and_the_store_is_intact(store: FaissStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: Any) -> int:
        path.write_bytes(b"half")
        raise RuntimeError("Error in write: No space left on device")

    fill(store, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(StoreFull, match="make room"):
            store.replace("s9", chunks("s9", 50), vectors(50), digest="1")
        with pytest.raises(StoreFull):
            store.compact(everything=True)
        monkeypatch.setattr("agentmesh.rag.compact.IVF_ROWS", 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.setattr("agentmesh.rag.compact.build_ivf", full)
        assert store.compact(everything=True)  # without an index, which can be done without
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(store.path / "g1" / "tmp") == []
    assert (store.count(), store.version, FaissStore(store.path).count()) == (6, 2, 6)
    assert store.replace("s9", chunks("s9", 50), vectors(50), digest="1").version == 3


def test_a_disk_that_does_not_confirm_says_so_and_the_key_makes_it_good(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error")

    fill(store, 1)
    with monkeypatch.context() as patched:
        patched.setattr("agentmesh.rag.core.sync", broken)
        with pytest.raises(StoreError, match="repeat it with the same key"):
            store.replace("a", chunks("a", 2), vectors(2), digest="1", key="k")
    assert store.replace("a", chunks("a", 2), vectors(2), digest="1", key="k").again
    assert store.count() == 5


@pytest.fixture
def read_only() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="agentmesh-"))
    yield path
    os.seteuid(os.getuid())
    subprocess.run(["chmod", "-R", "u+w", str(path)], check=True)
    shutil.rmtree(path)


def test_a_store_that_cannot_be_written_can_be_searched(read_only: Path) -> None:
    fill(FaissStore(read_only / "kb"), 3)
    FaissStore(read_only / "kb").compact(everything=True)
    fill(FaissStore(read_only / "kb"), 1)
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(read_only)], check=True)
    if os.getuid() == 0:
        os.seteuid(65534)  # root may write everywhere
    store = FaissStore(read_only / "kb")
    assert len(store.search(vectors(1)[0], 4, where={"source": {"$ne": "s1"}})) == 4
    assert store.verify() == []
    with pytest.raises(StoreError, match="cannot write in"):
        store.replace("s9", chunks("s9", 1), vectors(1), digest="1")
    with pytest.raises(StoreError, match="cannot write in"):
        store.compact(everything=True)


def test_another_embedder_is_refused(store: FaissStore) -> None:
    one = Identity("one", d=D, probe=tuple(np.eye(D)[0]))
    FaissStore(store.path, identity=one).replace("a", chunks("a", 1), vectors(1), digest="1")
    assert store.identity == one
    assert FaissStore(store.path, identity=one).count() == 1
    with pytest.raises(EmbedderMismatch):
        FaissStore(store.path, identity=Identity("two", d=D, probe=tuple(np.eye(D)[1]))).count()
    with pytest.raises(EmbedderMismatch, match="width 8"):
        FaissStore(store.path, identity=Identity("three", d=4)).count()
    with pytest.raises(EmbedderMismatch, match="width 8"):
        store.replace("b", chunks("b", 1), np.ones((1, 4)), digest="1")


def test_a_generation_with_another_embedder_takes_over(store: FaissStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, 6)
    store.delete(["s1#0"])
    store.replace("p", chunks("p", 2)[:1], vectors(1), digest="1", part=(1, 2), key="p/1")
    store.replace("q", chunks("q", 2)[:1], vectors(1), digest="1", part=(1, 2))
    calls, told = 0, []

    def embed(texts: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt  # killed in the middle
        if calls == 3:  # others write meanwhile
            writer.replace("s0", chunks("s0", 1, "newer"), vectors(1), digest="2", expects="1")
            writer.remove(["s2"])
            writer.set("s3#0", {"n": 1})
            writer.replace("p", chunks("p", 2)[1:], vectors(1), digest="1", part=(2, 2))
            writer.compact(everything=True)
        return np.array([[len(t), 1, 2] for t in texts], np.float32)

    writer, reader = FaissStore(store.path), FaissStore(store.path)
    monkeypatch.setattr("agentmesh.rag.reembed.BATCH", 4)
    assert reader.count() == 17
    with pytest.raises(KeyboardInterrupt):
        store.reembed(embed, d=3)
    version = store.reembed(embed, identity=Identity("new", d=3), progress=lambda a, b: told.append((a, b)))
    assert told[-1][0] == told[-1][1]
    for one in (store, reader, writer, FaissStore(store.path)):
        time.sleep(follow.POLL_S)
        assert one.version == version
        assert one.stats().generation == "g2"
        assert sorted(one.sources()) == ["p", "s0", "s1", "s3", "s4", "s5"]
        assert sorted(c.text for c in one.get(["s0#0", "p#0", "p#1"]) if c) == ["newer 0", "text 0", "text 1"]
        assert (one.count(), one.count({"n": 1}), one.get(["s1#0"])) == (14, 1, [None])
        assert len(one.search([5, 1, 2], 20)) == 14
    assert store.replace("p", [], [], digest="9", key="p/1").again
    with pytest.raises(EmbedderMismatch):
        writer.replace("z", chunks("z", 1), vectors(1), digest="1")
    writer.replace("q", chunks("q", 2)[1:], np.ones((1, 3)), digest="1", part=(2, 2))
    time.sleep(follow.POLL_S)
    assert store.bound({"source": "q"}).count() == 2
    assert store.verify() == []
    monkeypatch.setattr(folder, "KEEP_S", 0.0)
    folder.drop_generations(store.path, "g2", 0.0)
    assert not (store.path / "g1").exists()
    reader._core._checked = float("-inf")
    assert reader.bound({"source": "q"}).count() == 2


def test_a_reader_follows_there_and_back_and_no_further(store: FaissStore) -> None:
    """Opened for embedder `a`: it lives through a turn to `b` and back, and refuses when the store stays with `b`."""
    a, b = Identity("a", d=3, probe=(1.0, 0.0, 0.0)), Identity("b", d=3, probe=(0.0, 1.0, 0.0))

    def embed(texts: Any) -> np.ndarray:
        return np.array([[len(t), 1, 2] for t in texts], np.float32)

    FaissStore(store.path, identity=a).replace("s", chunks("s", 2), embed(["x", "y"]), digest="1")
    reader = FaissStore(store.path, identity=a)
    assert reader.count() == 2
    store.reembed(embed, identity=b)
    store.reembed(embed, identity=a)
    time.sleep(follow.POLL_S)
    assert (reader.count(), reader.stats().generation) == (2, "g3")
    store.reembed(embed, identity=b)
    time.sleep(follow.POLL_S)
    for _ in range(2):
        with pytest.raises(EmbedderMismatch):
            reader.count()


def test_filters_of_every_kind(store: FaissStore) -> None:
    when = datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    rows: list[dict[str, Any]] = [
        {"n": 1, "ok": True, "when": when, "tags": ["a", "b"], "name": "x"},
        {"n": 2.5, "ok": False, "when": datetime(2024, 5, 1, 10), "tags": [], "name": "y"},
        {"n": "two", "name": "z"},
    ]
    given = [Chunk(f"c{i}", "t", "s", 0, (), row) for i, row in enumerate(rows)]
    store.upsert(given, vectors(3))
    for _ in range(2):  # as it is in memory, then from a merged file
        for where, found in [
            ({"n": {"$gt": 0}}, "01"), ({"n": {"$ne": 1}}, "12"), ({"n": {"$in": [1, "two"]}}, "02"),
            ({"n": True}, ""), ({"ok": True}, "0"), ({"ok": 1}, ""), ({"tags": "b"}, "0"), ({"tags": {"$nin": ["a"]}}, "12"),
            ({"tags": {"$exists": True}}, "01"), ({"when": datetime(2024, 5, 1, 10, tzinfo=UTC)}, "01"),
            ({"when": {"$lt": when}}, ""), ({"name": {"$gte": "y"}}, "12"), ({"$not": {"n": {"$gt": 0}}}, "2"),
            ({"$or": [{"name": "x"}, {"n": "two"}]}, "02"), ({"name": "x", "n": {"$gte": 1, "$lte": 1}}, "0"), ({}, "012"),
        ]:  # fmt: skip
            assert "".join(sorted(h.id[1] for h in store.search(vectors(1)[0], 9, where=where))) == found, where
        assert [c.metadata for c in store.get(["c0", "c1"]) if c][0]["when"] == when
        store.upsert([Chunk("d", "t", "s")], vectors(1))
        store.delete(["d"])
        store.compact(everything=True)


@pytest.mark.parametrize(("where", "said"), [
    (lambda row: True, "function"), ({"n": {"$gt": lambda: 1}}, "function"), ({"n": {"$regex": "x"}}, "unknown operator"),
    ({"$ad": []}, "Did you mean '\\$and'"), ({"nn": 1}, "no chunk has a field 'nn'. Did you mean 'n'"),
    ({"n": [1]}, r"\$in"), ({"n": float("nan")}, "nan"), ({"n": {"$in": "abc"}}, "takes a list"), (3, "mapping"),
    ({"n": {}}, "empty"), ({"$and": []}, "list of filters"), ({"n": {"$exists": 1}}, "true or false"), ({1: 2}, "name"),
])  # fmt: skip
def test_a_filter_that_cannot_be_understood(store: FaissStore, where: Any, said: str) -> None:
    store.upsert(chunks("s", 1, n=1), vectors(1))
    with pytest.raises(FilterInvalid, match=said):
        store.search(vectors(1)[0], 1, where=where)


def test_bad_input_has_its_sentence_and_changes_nothing(store: FaissStore) -> None:
    fill(store, 1)
    one, bad = chunks("s", 1), vectors(2)
    bad[1, 2] = np.nan
    for said, call in [
        ("is twice in one commit", lambda: store.upsert(one * 2, vectors(2))),
        ("source 's' is twice", lambda: store.replace_many([Replacement("s", [], [], "1")] * 2)),
        ("'s#1' holds NaN", lambda: store.upsert(chunks("s", 2), bad)),
        ("is zero", lambda: store.upsert(one, np.zeros((1, D)))),
        ("shape", lambda: store.upsert(one, vectors(2))),
        ("was given for 'x'", lambda: store.replace("x", one, vectors(1), digest="1")),
        ("part", lambda: store.replace("s", one, vectors(1), digest="1", part=(0, 2))),
        ("an id is text", lambda: store.upsert([Chunk("", "t")], vectors(1))),
        ("does not begin with", lambda: store.upsert(chunks("s", 1, **{"$x": 1}), vectors(1))),
        ("is a dict", lambda: store.upsert(chunks("s", 1, x={}), vectors(1))),
        ("64 bits", lambda: store.upsert(chunks("s", 1, x=2**63), vectors(1))),
        ("is NaN", lambda: store.upsert(chunks("s", 1, x=float("nan")), vectors(1))),
        ("half a character", lambda: store.upsert(chunks("s", 1, "\ud800"), vectors(1))),
        ("has no chunk 'no'", lambda: store.set("no", {})),
        ("has no chunk 'no'", lambda: store.vectors(["no"])),
        ("k is 0", lambda: store.search(vectors(1)[0], 0)),
        ("width 3", lambda: store.search([1, 2, 3], 1)),
        ("question's vector is zero", lambda: store.search(np.zeros(D), 1)),
        ("question's vector holds NaN", lambda: store.search([np.nan] * D, 1)),
        ('"cosine" or "l2"', lambda: FaissStore(store.path, metric="dot")),
        ("holds vectors for 'cosine'", lambda: FaissStore(store.path, metric="l2").count()),
    ]:
        with pytest.raises(StoreError, match=said):
            call()
    assert (store.version, store.count()) == (1, 3)
    assert len(store.search(vectors(1)[0], 50)) == 3  # k above what there is


def test_a_store_of_a_newer_format_is_left_alone(store: FaissStore, tmp_path: Path) -> None:
    fill(store, 1)
    about = store.path / "g1" / "about.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreVersion, match="upgrade agentmesh"):
        FaissStore(store.path).count()


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
    monkeypatch.setattr("agentmesh.rag.ivf.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.view.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.compact.IVF_ROWS", 5000)
    monkeypatch.setattr("agentmesh.rag.view.EXACT_ROWS", 100)
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


def test_two_compactors_do_not_meet(store: FaissStore) -> None:
    fill(store, 3)
    files = store._core.folder
    assert files
    with files.alone() as mine:
        assert mine
        assert not FaissStore(store.path).compact(everything=True)
    assert FaissStore(store.path).compact(everything=True)
    assert not FaissStore(store.path).compact(everything=True)


def test_the_store_imports_no_torch_and_no_celery() -> None:
    code = "import sys, agentmesh.rag.store; print([m for m in ('torch', 'celery', 'tantivy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert state.SMALL_ROWS < compact.LIGHT_ROWS
