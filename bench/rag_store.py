"""A FAISS store and its disk: commits, reader lag, opening and memory at 100,000 chunks: `python bench/rag_store.py`."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine, median
from rag_search import D, K, clustered, memory

from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.faiss_store import FaissStore

TEXT = "A passage of about as many words as one that was cut from a document at its paragraphs has in it. " * 6


def batch(number: int, n: int) -> list[Chunk]:
    """n chunks of one text each, one document a chunk."""
    return [Chunk(f"{number}-{i}", TEXT, f"d{number}-{i}", 0, (), {"p": (number * n + i) % 1000}) for i in range(n)]


def commits(folder: Path) -> None:
    """Commits of 32 documents with their vectors, alternating with a plain fsync of as many bytes."""
    store = FaissStore(folder / "commits")
    rng = np.random.default_rng(0)
    commit_ms, fsync_ms = [], []
    size = 32 * (4 * D + len(TEXT))
    for n in range(220):
        chunks, vectors = batch(n, 32), rng.standard_normal((32, D), dtype=np.float32)
        began = time.perf_counter()
        with open(folder / f"fsync{n}", "wb") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
        between = time.perf_counter()
        store.upsert(chunks, vectors)
        fsync_ms.append((between - began) * 1000)
        commit_ms.append((time.perf_counter() - between) * 1000)
    fsync, commit = median(fsync_ms[20:]), median(commit_ms[20:])
    print(
        f"commit of 32 documents: p50 {commit:.2f} ms, plain fsync of as many bytes {fsync:.2f} ms, ratio {commit / fsync:.2f}"
    )


WRITER = """
import sys, time
import numpy as np
from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.faiss_store import FaissStore
store, log = FaissStore(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
rng = np.random.default_rng(1)
for n in range(200):
    due = time.monotonic() + 0.05
    commit = store.upsert([Chunk(f"{n}-{i}", "text", "s") for i in range(32)], rng.standard_normal((32, 384)))
    print(commit.version, time.monotonic(), file=log)
    time.sleep(max(0, due - time.monotonic()))
"""


def lag(folder: Path) -> None:
    """The time from the return of a commit in one process until a search in another process sees it, at 20 commits/s."""
    path, log = folder / "lag", folder / "lag.log"
    store = FaissStore(path)
    store.upsert(batch(0, 32), np.random.default_rng(0).standard_normal((32, D)))
    seen: dict[int, float] = {}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(log)]) as writer:
        query = np.random.default_rng(2).standard_normal(D)
        while writer.poll() is None or not seen:
            store.search(query, K)
            seen.setdefault(store.version, time.monotonic())
            time.sleep(0.002)
    lags = []
    for line in log.read_text().splitlines():
        version, when = int(line.split()[0]), float(line.split()[1])
        first = [t for v, t in seen.items() if v >= version]
        if first:
            lags.append(max(0.0, min(first) - when) * 1000)
    lags.sort()
    print(
        f"reader lag at 20 commits/s: p50 {median(lags):.0f} ms, p99 {lags[int(len(lags) * 0.99)]:.0f} ms, {len(lags)} commits"
    )


def opening(folder: Path) -> None:
    """100,000 chunks as an ingest leaves them, merged only by the writer."""
    vectors, _ = clustered(100_000, 1)
    store = FaissStore(folder / "open")
    began = time.perf_counter()
    for n in range(0, 100_000, 320):
        store.upsert(batch(n // 320, min(320, 100_000 - n)), vectors[n : n + 320])
    seconds = time.perf_counter() - began
    print(f"100,000 x {D} in commits of 320: {100_000 / seconds:,.0f} chunks/s; {store.stats().files} files, "
          f"{store.stats().in_memory:,d} rows in memory")  # fmt: skip
    print("  a fresh process: " + memory(folder / "open", 1.3, 100_000))
    store.compact(everything=True)
    print("  the same, compacted: " + memory(folder / "open", 1.3, 100_000))


def main() -> None:
    """Print the figures."""
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="bench-rag-"))
    try:
        commits(folder)
        lag(folder)
        opening(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
