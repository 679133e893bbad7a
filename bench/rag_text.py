"""Full-text and hybrid search compared with vector search, over one store: `python bench/rag_text.py [rows]`.

Words follow a Zipf distribution, as in real text; vectors are random. Neither changes the cost of a search.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine
from rag_search import p50_ms

from agentmesh.rag.documents import Chunk
from agentmesh.rag.store.faiss_store import FaissStore

D, WORDS, CHUNK_WORDS, K, QUERIES, BATCH = 384, 50_000, 150, 10, 300, 5_000


def main(n: int) -> None:
    """Fill a store, merge it, search it."""
    rng = np.random.default_rng(7)
    words = np.array([f"word{i}" for i in range(WORDS)])
    path = Path(tempfile.mkdtemp(prefix="agentmesh-bench-"))
    store = FaissStore(path)
    began = time.perf_counter()
    for first in range(0, n, BATCH):
        size = min(BATCH, n - first)
        texts = [" ".join(words[row]) for row in (rng.zipf(1.2, (size, CHUNK_WORDS)) - 1) % WORDS]
        chunks = [Chunk(f"c{first + i}", t, "s", metadata={"part": (first + i) % 50}) for i, t in enumerate(texts)]
        store.upsert(chunks, rng.standard_normal((size, D)).astype(np.float32))
    filled = time.perf_counter()
    store.compact(everything=True)
    merged_s = time.perf_counter() - filled
    print(machine())
    print(
        f"{n} chunks of {CHUNK_WORDS} words: filled in {filled - began:.1f} s, merged with an index in {merged_s:.1f} s"
    )

    vectors = rng.standard_normal((QUERIES, D)).astype(np.float32)
    # a query: two frequent words and two rarer ones
    queries = [" ".join(words[[*rng.integers(0, 200, 2), *rng.integers(200, 20_000, 2)]]) for _ in range(QUERIES)]
    store = FaissStore(path)
    began = time.perf_counter()
    store.search(vectors[0], K)
    opened = time.perf_counter()
    store.search_text(queries[0], K)
    words_ms = (time.perf_counter() - opened) * 1e3
    print(f"first dense search {(opened - began) * 1e3:.0f} ms, then the first by words {words_ms:.0f} ms")
    for label, where in (("no filter", None), ("2 % pass", {"part": 7}), ("10 % pass", {"part": {"$lt": 5}})):
        dense = p50_ms(lambda i, w=where: store.search(vectors[i], K, where=w), range(QUERIES))[0]
        by_words = p50_ms(lambda i, w=where: store.search_text(queries[i], K, where=w), range(QUERIES))[0]
        both = p50_ms(lambda i, w=where: store.search_hybrid(queries[i], vectors[i], K, where=w), range(QUERIES))[0]
        print(
            f"p50 of {K}, {label:9}: dense {dense:5.2f} ms, words {by_words:5.2f} ms, hybrid {both:5.2f} ms,"
            f" {both - dense:5.2f} ms above dense"
        )
    shutil.rmtree(path)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
