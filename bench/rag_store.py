"""A FAISS store as a disk sees it: commits, readers, opening, and the same beside langchain-community's FAISS.

python bench/rag_store.py             commit, reader lag, opening and memory at 100,000 chunks
python bench/rag_store.py --beside    beside langchain-community too (needs the extra `langchain`)
"""

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
    """Commits of 32 documents with their vectors, in turns with a bare fsync of as many bytes."""
    store = FaissStore(folder / "commits")
    rng = np.random.default_rng(0)
    mine, bare = [], []
    size = 32 * (4 * D + len(TEXT))
    for n in range(220):
        chunks, vectors = batch(n, 32), rng.standard_normal((32, D), dtype=np.float32)
        begun = time.perf_counter()
        with open(folder / f"bare{n}", "wb") as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
        between = time.perf_counter()
        store.upsert(chunks, vectors)
        bare.append((between - begun) * 1000)
        mine.append((time.perf_counter() - between) * 1000)
    fsync, commit = median(bare[20:]), median(mine[20:])
    print(
        f"commit of 32 documents: p50 {commit:.2f} ms, bare fsync of as many bytes {fsync:.2f} ms, ratio {commit / fsync:.2f}"
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
    done = store.upsert([Chunk(f"{n}-{i}", "text", "s") for i in range(32)], rng.standard_normal((32, 384)))
    print(done.version, time.monotonic(), file=log)
    time.sleep(max(0, due - time.monotonic()))
"""


def lag(folder: Path) -> None:
    """From the return of a commit in one process to a search in another that sees it, at 20 commits/s."""
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
    waits = []
    for line in log.read_text().splitlines():
        version, when = int(line.split()[0]), float(line.split()[1])
        first = [t for v, t in seen.items() if v >= version]
        if first:
            waits.append(max(0.0, min(first) - when) * 1000)
    waits.sort()
    print(
        f"reader lag at 20 commits/s: p50 {median(waits):.0f} ms, p99 {waits[int(len(waits) * 0.99)]:.0f} ms, {len(waits)} commits"
    )


def opening(folder: Path) -> None:
    """100,000 chunks as an ingest leaves them, merged by nobody but the writer."""
    vectors, _ = clustered(100_000, 1)
    store = FaissStore(folder / "open")
    begun = time.perf_counter()
    for n in range(0, 100_000, 320):
        store.upsert(batch(n // 320, min(320, 100_000 - n)), vectors[n : n + 320])
    took = time.perf_counter() - begun
    print(f"100,000 x {D} in commits of 320: {100_000 / took:,.0f} chunks/s; {store.stats().files} files, "
          f"{store.stats().in_memory:,d} rows in memory")  # fmt: skip
    print("  a fresh process: " + memory(folder / "open", 1.3, 100_000))
    store.compact(everything=True)
    print("  the same, compacted: " + memory(folder / "open", 1.3, 100_000))


def main() -> None:
    """Prints the figures."""
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
