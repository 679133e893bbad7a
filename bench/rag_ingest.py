"""What an ingest through Celery costs beside a bare loop; parse workers, journal and store included.

    python bench/rag_ingest.py [--documents 500] [--chunks 20] [--rounds 1]

Both read, cut, embed and commit the same files with the same encoder, dtype and threads. The encoder has MiniLM's shape
and random weights, made here. The bare loop cuts all, sorts all by length and embeds them in one go; in a thread, as a
worker does, because OpenMP's threads spin when they are called from the main one, which costs twice the CPU on a busy
machine. Models are loaded before the clock starts. Then the same folder again, unchanged. CPU is that of all processes, Valkey's too.
"""

import argparse
import random
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import cpu_s, machine, valkey, valkey_cpu_s
from transformers import BertConfig, BertModel, BertTokenizer

from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.rag import loaders
from agentmesh.rag.embedders import embedder
from agentmesh.rag.ingest import Added
from agentmesh.rag.ingestion.plan import ChunkOptions, content_digest
from agentmesh.rag.splitter import split
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.writer import Replacement
from agentmesh.retriever import Retriever
from agentmesh.runtime.crew_file import load_crew
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.supervisor import Supervisor

CREW = "agentmesh.rag.ingest"
SIZE = 600  # characters in a chunk: about 128 tokens of the made words
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_encoder(folder: Path, rng: random.Random) -> list[str]:
    """MiniLM-L6's shape with random weights; its words."""
    words = sorted({"".join(rng.choices(LETTERS, k=rng.randint(2, 7))) for _ in range(30_000)})
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        max_position_embeddings=512,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
    BertTokenizer(vocab={w: i for i, w in enumerate(vocab)}).save_pretrained(folder)
    return words


def make_documents(folder: Path, words: list[str], rng: random.Random, *, documents: int, chunks: int) -> None:
    """Files of so many chunks, of mixed lengths: each paragraph is a chunk."""
    for i in range(documents):
        paragraphs = []
        for _ in range(chunks):
            length = rng.randint(SIZE * 6 // 10, SIZE - 20)
            text = ""
            while len(text) < length:
                text += rng.choice(words) + " "
            paragraphs.append(text.strip() + ".")
        path = folder / f"{i % 10}" / f"{i}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(paragraphs))


def bare(docs: Path, store: Path, name: str) -> tuple[float, float, int]:
    """Seconds, CPU seconds, and how many chunks."""
    by, how = embedder(name), ChunkOptions(size=SIZE, overlap=0)
    identity = by.identity
    began, spent = time.perf_counter(), time.process_time()
    found = []
    for path in sorted(docs.rglob("*.md")):
        data = path.read_bytes()
        source = path.relative_to(docs).as_posix()
        chunks = split(loaders.parse(data, path.name), source, size=SIZE, overlap=0)
        found.append((source, content_digest(data, how.mark()), chunks))
    vectors = by.documents([c.text for _, _, chunks in found for c in chunks])
    kept, at = FaissStore(store, identity=identity), 0
    for i in range(0, len(found), 64):
        wanted = []
        for source, digest, chunks in found[i : i + 64]:
            wanted.append(Replacement(source, chunks, vectors[at : at + len(chunks)], digest=digest))
            at += len(chunks)
        kept.replace_many(wanted)
    return time.perf_counter() - began, time.process_time() - spent, at


class Ingesting:
    """Supervised workers, as `agentmesh rag add` starts them, and a mesh."""

    def __init__(self, url: str, broker: str) -> None:
        self._url = url
        config = Config(broker=broker, journal=url)
        self.mesh = Mesh(load_crew(CREW), config=config)
        self._supervisor = Supervisor(
            worker_commands(config, {CREW: self.mesh.crew}), drain_s=2, output=subprocess.DEVNULL,
            on_death=release_on_death(config, self.mesh.crew.queues.broker_names()),
        )  # fmt: skip

    def __enter__(self) -> "Ingesting":
        self._supervisor.start()
        assert self._supervisor.wait_ready(60)
        return self

    def __exit__(self, *exc: object) -> None:
        self._supervisor.stop()
        self._supervisor.join(5)
        self.mesh.close()

    def add(self, docs: Path, store: Path, name: str) -> tuple[float, float, Added]:
        """Seconds, CPU seconds of everybody, and what was added."""
        agent, asked = Retriever.open(store, embed=name).ingest(docs, size=SIZE, overlap=0)
        began, spent = time.perf_counter(), self._cpu_s()
        added = self.mesh.run(agent, asked, timeout_s=3600)
        return time.perf_counter() - began, self._cpu_s() - spent, added

    def _cpu_s(self) -> float:
        """Of this process, the workers, the children of the prefork one, and Valkey."""
        pids = list(self._supervisor.pids.values())
        for pid in list(pids):
            for thread in Path(f"/proc/{pid}/task").glob("*/children"):
                pids += [int(child) for child in thread.read_text().split()]
        return time.process_time() + sum(cpu_s(pid) for pid in pids) + valkey_cpu_s(self._url)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="bench-rag-") as folder, valkey() as server:
        at = Path(folder)
        name = f"local:{at / 'encoder'}"
        words = make_encoder(at / "encoder", rng)
        make_documents(at / "docs", words, rng, documents=given.documents, chunks=given.chunks)
        make_documents(at / "warm", words, rng, documents=1, chunks=1)
        embedder(name).documents(["warm"])
        print(machine(), f"· torch threads {torch.get_num_threads()}")
        with Ingesting(server.url, server.broker_url) as ingesting, ThreadPoolExecutor(1) as thread:
            ingesting.add(at / "warm", at / "warm-store", name)
            for i in range(given.rounds):
                loop_s, loop_cpu_s, chunks = thread.submit(bare, at / "docs", at / f"bare-{i}", name).result()
                mesh_s, mesh_cpu_s, added = ingesting.add(at / "docs", at / f"mesh-{i}", name)
                again_s, _, again = ingesting.add(at / "docs", at / f"mesh-{i}", name)
                assert (added.documents, added.chunks, added.failed) == (given.documents, chunks, [])
                assert (again.documents, again.skipped) == (0, given.documents)
                print(f"{given.documents} documents, {chunks} chunks: bare loop {loop_s:.1f} s ({chunks / loop_s:.0f}/s), "
                      f"ingest {mesh_s:.1f} s: {loop_s / mesh_s:.0%} of the loop's rate; "
                      f"CPU {loop_cpu_s:.1f} and {mesh_cpu_s:.1f} s: {loop_cpu_s / mesh_cpu_s:.0%}; "
                      f"unchanged again {again_s:.3f} s: {mesh_s / again_s:.0f} times faster", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
