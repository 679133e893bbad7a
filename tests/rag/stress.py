"""Processes that write, read and merge one store until they are killed, and log what was acknowledged.

stress.py ROLE FOLDER NUMBER
"""

import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from agentmesh.rag.documents import Chunk
from agentmesh.rag.store import compaction, folder, follower, state
from agentmesh.rag.store.faiss_store import FaissStore

D = 16
CHUNKS = 5


def log_line(file: int, *words: str) -> None:
    """Write a line; it is in the page cache when this returns, so that a SIGKILL does not lose it."""
    os.write(file, (" ".join(words) + "\n").encode())


def write(store: FaissStore, path: Path, number: int) -> None:
    """Replace and remove the sources of this writer; log each intent before, and each acknowledgement after."""
    rng = random.Random()
    log = os.open(path / f"writer-{number}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    digests = {s: f.digest for s, f in store.sources().items() if s.startswith(f"w{number}-")}
    while True:
        source, digest = f"w{number}-{rng.randrange(12)}", os.urandom(6).hex()
        before = digests.get(source, "")
        if before and rng.random() < 0.25:
            log_line(log, "wants", source, "-")
            assert not store.remove([source], expects={source: before}).refused
            digests.pop(source)
            log_line(log, "has", source, "-")
            continue
        log_line(log, "wants", source, digest)
        parts = rng.choice([1, 1, 2])
        for part in range(1, parts + 1):
            chunks = [
                Chunk(f"{source}#{i}", f"{digest} {i}", source, i, (), {"digest": digest})
                for i in range(CHUNKS) if parts == 1 or i % 2 == part - 1
            ]  # fmt: skip
            vectors = np.random.default_rng().standard_normal((len(chunks), D))
            store.replace(
                source, chunks, vectors, digest=digest, expects=before, key=f"{digest}/{part}", part=(part, parts)
            )
        digests[source] = digest
        log_line(log, "has", source, digest)


def incomplete_source(store: FaissStore) -> str:
    """A source that is partly visible in one snapshot; "" for none."""
    digests_of: dict[str, set[str]] = defaultdict(set)
    chunks_of: dict[str, int] = defaultdict(int)
    for chunks in store.iterate():
        for chunk in chunks:
            digests_of[chunk.source].add(chunk.text.split()[0])
            chunks_of[chunk.source] += 1
    for source, digests in digests_of.items():
        if len(digests) > 1 or chunks_of[source] != CHUNKS:
            return f"{source} has {chunks_of[source]} chunks of {sorted(digests)}"
    return ""


def read(store: FaissStore, path: Path, number: int) -> None:
    """Search, and log documents that are partly visible and versions that go back."""
    log = os.open(path / f"reader-{number}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    last = 0
    while True:
        version = store.version
        if version < last:
            log_line(log, f"version {version} after {last}")
        last = version
        if problem := incomplete_source(store):
            log_line(log, problem)
        hits = store.search(np.random.default_rng().standard_normal(D), 10)
        if len(hits) < min(10, store.count()) and version == store.version:
            log_line(log, f"{len(hits)} hits of {store.count()}")


def merge(store: FaissStore, path: Path, number: int) -> None:
    """Merge without a pause."""
    while True:
        store.compact(everything=random.random() < 0.3)
        time.sleep(0.01)


if __name__ == "__main__":
    state.SMALL_ROWS = compaction.SMALL_ROWS = 64  # so that small segments take the code path of large ones too
    compaction.TAIL_MERGE_FILES = 40
    folder.RETENTION_S, folder.RETIRE_AFTER_S = 4.0, 2.0
    follower.RELIST_AFTER_S = 1.0
    role, where, number = sys.argv[1:]
    {"write": write, "read": read, "merge": merge}[role](FaissStore(Path(where) / "kb"), Path(where), int(number))
