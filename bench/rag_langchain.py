"""Our vector store compared with langchain-community's FAISS, through LangChain's interface, over the same random vectors.

python bench/rag_langchain.py [rows]
"""

import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import numpy as np
from common import machine
from langchain_core.embeddings import Embeddings
from rag_search import p50_ms

from agentmesh.langchain import FaissVectorStore

warnings.simplefilter("ignore")
from langchain_community.vectorstores import FAISS  # noqa: E402  (it warns of its deprecation at import)

D, K, BATCH, QUERIES, KILLS = 384, 10, 1000, 200, 8


class Numbers(Embeddings):
    """Random vectors for texts that are numbers, without any computation."""

    def __init__(self, n: int) -> None:
        vectors = np.random.default_rng(5).standard_normal((n + QUERIES, D)).astype(np.float32)
        self.vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.vectors[[int(t) % len(self.vectors) if t.isdecimal() else 0 for t in texts]].tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


def rows(first: int, n: int) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """Texts, metadata and ids; 2 % are rare."""
    numbers = range(first, first + n)
    return [str(i) for i in numbers], [{"rare": i % 50 == 7} for i in numbers], [f"id{i}" for i in numbers]


def empty_theirs(embeddings: Embeddings) -> Any:
    """An empty store of langchain-community."""
    import faiss
    from langchain_community.docstore.in_memory import InMemoryDocstore

    return FAISS(embeddings, faiss.IndexFlatL2(D), InMemoryDocstore(), {})


def recall(results: list[list[str]], true: list[set[str]]) -> float:
    """The share of the true nearest that is in the results."""
    return sum(len(set(ids) & t) for ids, t in zip(results, true, strict=True)) / sum(map(len, true))


def writer(kind: str, folder: str) -> None:
    """Add batches for ever; print each number of rows once they are on disk."""
    embeddings = Numbers(BATCH)
    store = FaissVectorStore(folder, embedding=embeddings) if kind == "ours" else empty_theirs(embeddings)
    for first in range(0, 10**9, 100):
        store.add_texts(*rows(first, 100)[:2], ids=rows(first, 100)[2])
        if kind == "theirs":
            store.save_local(folder)
        print(first + 100, flush=True)


def after_kills(kind: str) -> str:
    """What is left of the acknowledged rows after a kill, each time in a new folder."""
    intact, broken, lost = 0, 0, 0
    for attempt in range(KILLS):
        folder = tempfile.mkdtemp(prefix="agentmesh-bench-")
        process = subprocess.Popen([sys.executable, __file__, kind, folder], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(0.6 + attempt * 0.037)
        process.send_signal(signal.SIGKILL)
        process.wait()
        acknowledged = max([acknowledged, *(int(line) for line in process.stdout.read().split())])
        try:
            store: Any = FaissVectorStore(folder, embedding=Numbers(BATCH)) if kind == "ours" else FAISS.load_local(
                folder, Numbers(BATCH), allow_dangerous_deserialization=True
            )  # fmt: skip
            present = len(store.get_by_ids([f"id{i}" for i in range(acknowledged)]))
            if kind == "theirs" and store.index.ntotal != len(store.index_to_docstore_id):
                broken += 1  # its two files are of different times
            elif present == acknowledged:
                intact += 1
            else:
                lost += acknowledged - present
        except Exception:  # a half-written index or pickle may raise anything
            broken += 1
        shutil.rmtree(folder)
    return f"{intact} of {KILLS} folders intact, {broken} unreadable or inconsistent, {lost} acknowledged rows lost in the others"


def main(n: int) -> None:
    """Print the comparison."""
    print(machine())
    embeddings = Numbers(n)
    queries = [str(n + i) for i in range(QUERIES)]
    cosines = embeddings.vectors[n:] @ embeddings.vectors[:n].T  # (queries, n)
    rare = np.arange(n) % 50 == 7
    true = [{f"id{i}" for i in np.argsort(-row)[:K]} for row in cosines]
    true_rare = [{f"id{i}" for i in np.argsort(-np.where(rare, row, -9))[:K]} for row in cosines]
    folder = tempfile.mkdtemp(prefix="agentmesh-bench-")
    ours, theirs = FaissVectorStore(folder + "/ours", embedding=embeddings), empty_theirs(embeddings)
    for name, store in (("agentmesh", ours), ("langchain-community", theirs)):
        began, saving_s = time.perf_counter(), 0.0
        for first in range(0, n, BATCH):
            texts, metadatas, ids = rows(first, BATCH)
            store.add_texts(texts, metadatas, ids=ids)
            if store is theirs and first % (10 * BATCH) == 0:
                before = time.perf_counter()
                theirs.save_local(folder + "/theirs")
                saving_s += time.perf_counter() - before
        took_s = time.perf_counter() - began - saving_s
        durable = "each batch on disk" if store is ours else "only in memory"
        print(f"{name}: {n / took_s:,.0f} rows/s added in batches of {BATCH}, {durable}")
        if store is theirs:
            before = time.perf_counter()
            theirs.save_local(folder + "/theirs")
            print(f"  saving all {n} rows again: {time.perf_counter() - before:.2f} s")
        plain_ms, plain_hits = p50_ms(lambda q, s=store: s.similarity_search(q, k=K), queries)
        filtered_ms, filtered_hits = p50_ms(
            lambda q, s=store: s.similarity_search(q, k=K, filter={"rare": True}), queries
        )
        plain, filtered = ([[d.id for d in hits] for hits in results] for results in (plain_hits, filtered_hits))
        print(
            f"  p50 {plain_ms:.2f} ms, recall {recall(plain, true):.2f}; under a filter of 2 % p50 {filtered_ms:.2f} ms, "
            f"recall {recall(filtered, true_rare):.2f}, {np.mean([len(ids) for ids in filtered]):.1f} of {K} hits"
        )
    shutil.rmtree(folder)
    for kind in ("ours", "theirs"):
        print(f"killed while it adds 100 rows at a time, {kind}: {after_kills(kind)}")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in ("ours", "theirs"):
        writer(sys.argv[1], sys.argv[2])
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 30_000)
