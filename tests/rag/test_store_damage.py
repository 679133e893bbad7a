"""Errors and contents of a store when files are damaged, the disk is full, or the folder is read-only."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmesh.errors import StoreDamaged, StoreError, StoreFull, StoreVersion
from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.faiss_store import FaissStore


def test_a_damaged_file_is_named_and_the_rest_is_read(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, samples: Any
) -> None:
    samples.fill(store, 3)
    files = store._writer.folder
    assert files
    second, third = files.file((2, 2)), files.file((3, 3))
    data = bytearray(second.read_bytes())
    data[80] ^= 1
    second.write_bytes(data)
    os.truncate(third, third.stat().st_size - 1)
    fresh = FaissStore(store.path)
    assert {h.source for h in fresh.search(samples.vectors(1)[0], 9)} == {"s0"}
    assert fresh.stats().damaged == (second.name, third.name)
    assert [m for m in caplog.messages if "is searched without it" in m]
    problems = fresh.verify()
    assert len(problems) == 2
    assert second.name in problems[0]
    assert "bytes of" in problems[1]
    with pytest.raises(StoreDamaged, match=second.name):
        fresh.compact(everything=True)
    fresh.replace("s1", samples.chunks("s1", 3), samples.vectors(3), digest="1")  # ingested again
    assert fresh.count() == 6
    second.unlink()
    assert "is missing" in FaissStore(store.path).verify()[0]
    assert FaissStore(store.path).count() == 6


def test_a_large_truncated_file_is_found_before_it_is_mapped(store: FaissStore, samples: Any) -> None:
    big = [Chunk(f"b#{i}", "x" * 2000, "b", i) for i in range(3000)]
    store.upsert(big, samples.vectors(3000))
    samples.fill(store, 1)
    path = store._writer.folder.file((1, 1))  # type: ignore[union-attr]
    assert path.stat().st_size > 4 << 20
    os.truncate(path, path.stat().st_size // 2)
    fresh = FaissStore(store.path)
    assert fresh.count() == 3
    assert fresh.stats().damaged == (path.name,)


def test_a_full_disk_is_an_error_and_the_store_is_intact(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    def full(path: Path, *_: Any) -> int:
        path.write_bytes(b"half")
        raise RuntimeError("Error in write: No space left on device")

    samples.fill(store, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(StoreFull, match="make room"):
            store.replace("s9", samples.chunks("s9", 50), samples.vectors(50), digest="1")
        with pytest.raises(StoreFull):
            store.compact(everything=True)
        monkeypatch.setattr("agentmesh.rag.store.compaction.IVF_ROWS", 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.setattr("agentmesh.rag.store.compaction.build_ivf", full)
        assert store.compact(everything=True)  # without an index, which is optional
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(store.path / "g1" / "tmp") == []
    assert (store.count(), store.version, FaissStore(store.path).count()) == (6, 2, 6)
    assert store.replace("s9", samples.chunks("s9", 50), samples.vectors(50), digest="1").version == 3


def test_a_commit_that_the_disk_did_not_confirm_is_repeated_with_its_key(
    store: FaissStore, monkeypatch: pytest.MonkeyPatch, samples: Any
) -> None:
    def broken(path: Path) -> None:
        raise OSError(5, "Input/output error")

    samples.fill(store, 1)
    with monkeypatch.context() as patched:
        patched.setattr("agentmesh.rag.store.writer.sync", broken)
        with pytest.raises(StoreError, match="repeat it with the same key"):
            store.replace("a", samples.chunks("a", 2), samples.vectors(2), digest="1", key="k")
    assert store.replace("a", samples.chunks("a", 2), samples.vectors(2), digest="1", key="k").repeated
    assert store.count() == 5


@pytest.fixture
def read_only() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="agentmesh-"))
    yield path
    os.seteuid(os.getuid())
    subprocess.run(["chmod", "-R", "u+w", str(path)], check=True)
    shutil.rmtree(path)


def test_a_read_only_store_can_be_searched(read_only: Path, samples: Any) -> None:
    samples.fill(FaissStore(read_only / "kb"), 3)
    FaissStore(read_only / "kb").compact(everything=True)
    samples.fill(FaissStore(read_only / "kb"), 1)
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(read_only)], check=True)
    if os.getuid() == 0:
        os.seteuid(65534)  # root may write everywhere
    store = FaissStore(read_only / "kb")
    assert len(store.search(samples.vectors(1)[0], 4, where={"source": {"$ne": "s1"}})) == 4
    assert store.verify() == []
    with pytest.raises(StoreError, match="cannot write in"):
        store.replace("s9", samples.chunks("s9", 1), samples.vectors(1), digest="1")
    with pytest.raises(StoreError, match="cannot write in"):
        store.compact(everything=True)


def test_a_store_of_a_newer_format_is_refused(store: FaissStore, tmp_path: Path, samples: Any) -> None:
    samples.fill(store, 1)
    settings = store.path / "g1" / "about.json"
    settings.write_text(settings.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(StoreVersion, match="upgrade agentmesh"):
        FaissStore(store.path).count()
