"""Processes that write, read and merge one store until they are killed; what they promised is in their logs.

storming.py ROLE FOLDER NUMBER
"""

import os
import random
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from agentmesh.rag.documents import Chunk
from agentmesh.rag.store import compaction, folder, state
from agentmesh.rag.store.faiss_store import FaissStore

D = 16
CHUNKS = 5


def note(file: int, *words: str) -> None:
    """One line, in the page cache when this returns: a SIGKILL does not take it away."""
    os.write(file, (" ".join(words) + "\n").encode())


def write(store: FaissStore, path: Path, number: int) -> None:
    """Replaces and removes the sources of this writer, noting each intent before and each answer after."""
    rng = random.Random()
    log = os.open(path / f"writer-{number}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    mine = {s: f.digest for s, f in store.sources().items() if s.startswith(f"w{number}-")}
    while True:
        source, digest = f"w{number}-{rng.randrange(12)}", os.urandom(6).hex()
        had = mine.get(source, "")
        if had and rng.random() < 0.25:
            note(log, "wants", source, "-")
            assert not store.remove([source], expects={source: had}).refused
            mine.pop(source)
            note(log, "has", source, "-")
            continue
        note(log, "wants", source, digest)
        parts = rng.choice([1, 1, 2])
        for part in range(1, parts + 1):
            chunks = [
                Chunk(f"{source}#{i}", f"{digest} {i}", source, i, (), {"digest": digest})
                for i in range(CHUNKS) if parts == 1 or i % 2 == part - 1
            ]  # fmt: skip
            vectors = np.random.default_rng().standard_normal((len(chunks), D))
            store.replace(
                source, chunks, vectors, digest=digest, expects=had, key=f"{digest}/{part}", part=(part, parts)
            )
        mine[source] = digest
        note(log, "has", source, digest)


def whole_or_not(store: FaissStore) -> str:
    """What is half there in one view; nothing: an empty text."""
    found: dict[str, set[str]] = defaultdict(set)
    counted: dict[str, int] = defaultdict(int)
    for chunks in store.iterate():
        for chunk in chunks:
            found[chunk.source].add(chunk.text.split()[0])
            counted[chunk.source] += 1
    for source, digests in found.items():
        if len(digests) > 1 or counted[source] != CHUNKS:
            return f"{source} has {counted[source]} chunks of {sorted(digests)}"
    return ""


def read(store: FaissStore, path: Path, number: int) -> None:
    """Searches and looks for documents that are half there, and for versions that go back."""
    log = os.open(path / f"reader-{number}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    last = 0
    while True:
        version = store.version
        if version < last:
            note(log, f"version {version} after {last}")
        last = version
        if problem := whole_or_not(store):
            note(log, problem)
        hits = store.search(np.random.default_rng().standard_normal(D), 10)
        if len(hits) < min(10, store.count()) and version == store.version:
            note(log, f"{len(hits)} hits of {store.count()}")


def merge(store: FaissStore, path: Path, number: int) -> None:
    """Merges without a pause."""
    while True:
        store.compact(everything=random.random() < 0.3)
        time.sleep(0.01)


if __name__ == "__main__":
    state.SMALL_ROWS = compaction.SMALL_ROWS = 64  # small files count as large ones, so that all code is in the storm
    compaction.TAIL_MERGE_FILES = 40
    folder.RETENTION_S, folder.RETIRE_AFTER_S = 4.0, 2.0
    FRESH = float(os.environ.get("STORM_FRESH_S", "1"))
    from agentmesh.rag.store import follower

    follower.RELIST_AFTER_S = FRESH
    role, where, number = sys.argv[1:]
    {"write": write, "read": read, "merge": merge}[role](FaissStore(Path(where) / "kb"), Path(where), int(number))
