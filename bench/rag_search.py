"""Search of a FAISS store: exact search compared with plain FAISS, filters on every index, one million chunks.

python bench/rag_search.py              100,000 x 384: exact search and plain FAISS, filters
python bench/rag_search.py --million    1,000,000 x 384 too (5 GB of disk, minutes)
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from common import machine, median

from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.faiss_store import FaissStore

D, K, QUERIES = 384, 10, 200
SHARES = (500, 100, 20, 1)  # of 1000: the filters pass 50, 10, 2 and 0.1 %
BATCH = 20_000


def clustered(n: int, queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around 10,000 centres, x = c + 0.9 g / sqrt(d), of unit length; and queries of the same distribution."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((10_000, D), dtype=np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return around(rng, centres, n), around(rng, centres, queries)


def around(rng: Any, centres: np.ndarray, n: int) -> np.ndarray:
    """n points around the centres."""
    out = np.empty((n, D), np.float32)
    for first in range(0, n, BATCH):
        some = centres[rng.integers(len(centres), size=min(BATCH, n - first))]
        some = some + 0.9 / np.sqrt(D) * rng.standard_normal(some.shape, dtype=np.float32)
        out[first : first + len(some)] = some / np.linalg.norm(some, axis=1, keepdims=True)
    return out


def uniform(n: int, queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Directions without any structure: the worst case of an index."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((n + queries, D), dtype=np.float32)
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out[:n], out[n:]


def fill(path: Path, vectors: np.ndarray) -> FaissStore:
    """A store of these vectors, 20 chunks a document; field `p` is the row modulo 1000."""
    store = FaissStore(path)
    for first in range(0, len(vectors), BATCH):
        rows = range(first, min(first + BATCH, len(vectors)))
        store.upsert(
            [Chunk(str(r), f"chunk {r} of a text", f"doc{r // 20}", r % 20 * 500, (), {"p": r % 1000}) for r in rows],
            vectors[first : first + BATCH],
        )
    return store


def p50_ms(search: Callable[[Any], Any], queries: Sequence[Any] | np.ndarray) -> tuple[float, list[Any]]:
    """Median milliseconds of one query, after ten to warm up, and the result of each."""
    for q in queries[:10]:
        search(q)
    milliseconds, results = [], []
    for q in queries:
        began = time.perf_counter()
        results.append(search(q))
        milliseconds.append((time.perf_counter() - began) * 1000)
    return median(milliseconds), results


def truth(vectors: np.ndarray, queries: np.ndarray, rows: np.ndarray | None = None) -> list[set[str]]:
    """The ids of the K nearest, by brute force."""
    _, nearest = faiss.knn(queries, vectors if rows is None else vectors[rows], K, metric=faiss.METRIC_INNER_PRODUCT)
    return [{str(r if rows is None else rows[r]) for r in line if r >= 0} for line in nearest]


def recall(results: list[Any], true: list[set[str]]) -> float:
    """The share of the true nearest that is in the results."""
    return sum(len({h.id for h in hits} & t) for hits, t in zip(results, true, strict=True)) / sum(map(len, true))


def filters(store: FaissStore, vectors: np.ndarray, queries: np.ndarray) -> None:
    """Recall, full k and p50 under filters that pass 50, 10, 2 and 0.1 %."""
    for share in SHARES:
        rows = np.flatnonzero(np.arange(len(vectors)) % 1000 < share)
        where = {"p": {"$lt": share}}
        began = time.perf_counter()
        store.search(queries[0], K, where=where)
        first_ms = (time.perf_counter() - began) * 1000
        p50, results = p50_ms(lambda q, where=where: store.search(q, K, where=where), queries)
        full = sum(len(hits) == K for hits in results)
        print(
            f"  filter {share / 10:4.1f} % ({len(rows):7,d} rows): p50 {p50:6.2f} ms, first {first_ms:.1f} ms, "
            f"recall@10 {recall(results, truth(vectors, queries, rows)):.3f}, full k {full}/{len(results)}"
        )


def exact(folder: Path) -> None:
    """100,000 chunks without an index, compared with plain FAISS in the same process."""
    vectors, queries = clustered(100_000, QUERIES)
    store = fill(folder / "flat", vectors)
    store.compact(everything=True)
    plain = faiss.IndexFlatIP(D)
    plain.add(vectors)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # as in the store; more threads do not make a single query faster
    store_ms, plain_ms, results = [], [], []
    for q in np.concatenate([queries[:10], queries]):  # alternating, because the machine's speed varies
        began = time.perf_counter()
        plain.search(q[None], K)
        between = time.perf_counter()
        results.append(store.search(q, K))
        plain_ms.append((between - began) * 1000)
        store_ms.append((time.perf_counter() - between) * 1000)
    faiss.omp_set_num_threads(threads)
    ours, theirs = median(store_ms[10:]), median(plain_ms[10:])
    print(
        f"100,000 x {D}, exact: store p50 {ours:.2f} ms, plain IndexFlatIP {theirs:.2f} ms, ratio {ours / theirs:.2f}"
    )
    print(f"  recall@10 {recall(results[10:], truth(vectors, queries)):.3f}")
    filters(store, vectors, queries)


def million(folder: Path, name: str, n: int) -> None:
    """A million chunks with IVF,SQ8."""
    vectors, queries = (clustered if name == "clustered" else uniform)(n, 1000)
    began = time.perf_counter()
    store = fill(folder / name, vectors)
    print(f"{n:,d} x {D}, {name}: written in {time.perf_counter() - began:.0f} s", flush=True)
    began, cpu = time.perf_counter(), time.process_time()
    store.compact(everything=True)
    print(
        f"  merged and indexed in {time.perf_counter() - began:.0f} s on {os.cpu_count()} threads, "
        f"{time.process_time() - cpu:.0f} s of CPU",
        flush=True,
    )
    print(f"  lists probed: {store.stats().indexes}")
    p50, results = p50_ms(lambda q: store.search(q, K), queries)
    print(f"  p50 {p50:.2f} ms, recall@10 {recall(results, truth(vectors, queries)):.3f}", flush=True)
    filters(store, vectors, queries[:QUERIES])
    print("  a fresh process: " + memory(folder / name, 0.5, n), flush=True)


MEMORY = """
import sys, time
import numpy as np
from agentmesh.rag.store.faiss_store import FaissStore
def anonymous():
    status = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return [int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]
rng = np.random.default_rng(0)
np.ones((1, 2), np.float32) @ np.ones((2, 2), np.float32)
before = anonymous()
began = time.perf_counter()
store = FaissStore(sys.argv[1])
store.search(rng.standard_normal(384), 10)
opened = time.perf_counter() - began
for _ in range(200):
    store.search(rng.standard_normal(384), 10)
    store.search(rng.standard_normal(384), 10, where={"p": {"$lt": 100}})
after = anonymous()
print(opened, *(a - b for a, b in zip(after, before)))
"""


def memory(path: Path, most: float, n: int) -> str:
    """The memory of a separate process above its imports; mapped pages apart, which the system may reclaim."""
    argv = [sys.executable, "-c", MEMORY, str(path)]
    opened, anonymous, mapped = map(
        float, subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    )
    vectors_mb = n * D * 4 / 1024 / 1024
    return (
        f"opened with its first search in {opened:.2f} s; memory {anonymous:.0f} MB = {anonymous / vectors_mb:.2f} x the "
        f"vectors (aim {most}), mapped pages {mapped:.0f} MB"
    )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--rows", type=int, default=1_000_000)
    arguments = parser.parse_args()
    print(machine())
    folder = Path(tempfile.mkdtemp(prefix="bench-rag-"))
    try:
        exact(folder)
        print("  a fresh process: " + memory(folder / "flat", 1.3, 100_000))
        if arguments.million:
            for name in ("clustered", "uniform"):
                million(folder, name, arguments.rows)
                shutil.rmtree(folder / name)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
