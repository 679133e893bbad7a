"""SIGKILLs of writers, readers and compactors under load: no acknowledged document is lost, none is partly visible."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.store.folder import Folder, chain_and_gaps

STRESS = Path(__file__).with_name("stress.py")
KILLS = int(os.environ.get("AGENTMESH_KILLS", "24"))  # 200 in the long tier
ROLES = [("write", 0), ("write", 1), ("write", 2), ("read", 0), ("merge", 0), ("merge", 1)]


def start(role: str, path: Path, number: int) -> subprocess.Popen[bytes]:
    with open(path / f"{role}-{number}.err", "ab") as errors:
        return subprocess.Popen([sys.executable, str(STRESS), role, str(path), str(number)], stderr=errors)


def allowed_digests(log: Path) -> dict[str, set[str]]:
    """By source, the digests that the store may hold: the last acknowledged one, or one that was begun after it."""
    allowed: dict[str, set[str]] = {}
    for line in log.read_text().splitlines():
        verb, source, digest = line.split()
        allowed[source] = {digest} if verb == "has" else allowed.get(source, {"-"}) | {digest}
    return allowed


@pytest.mark.timeout(60 + 2 * KILLS)
def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path, eventually: Any) -> None:
    rng = random.Random()
    running = {role: start(role[0], tmp_path, role[1]) for role in ROLES}
    try:
        eventually(lambda: any(tmp_path.glob("writer-*.log")), timeout_s=30)
        for n in range(KILLS):
            time.sleep(rng.uniform(0.1, 0.6))
            if n % 24 in (4, 16):  # a writer is stopped while others merge and remove files, and continued
                running[ROLES[0]].send_signal(signal.SIGSTOP if n % 24 == 4 else signal.SIGCONT)
            kind = rng.choice(["write", "read", "merge"])
            role = rng.choice([r for r in ROLES[1:] if r[0] == kind])
            assert running[role].poll() is None, (tmp_path / f"{role[0]}-{role[1]}.err").read_text()[-2000:]
            running[role].send_signal(signal.SIGKILL)
            running[role].wait()
            running[role] = start(role[0], tmp_path, role[1])
        time.sleep(0.5)
    finally:
        died = {role: process.poll() for role, process in running.items() if process.poll() is not None}
        for process in running.values():
            process.kill()
            process.wait()
    assert not died
    assert "".join(p.read_text() for p in tmp_path.glob("reader-*.log")) == ""
    store = FaissStore(tmp_path / "kb")
    assert store.verify() == []
    spans, gaps = chain_and_gaps(Folder(tmp_path / "kb" / "g1").spans())
    assert not gaps
    assert spans[-1][1] == store.version
    digests = {source: facts.digest for source, facts in store.sources().items()}
    for log in tmp_path.glob("writer-*.log"):
        for source, allowed in allowed_digests(log).items():
            assert digests.pop(source, "-") in allowed, source
    assert not digests
    texts = {source: set[str]() for source in store.sources()}
    for chunks in store.iterate():
        for chunk in chunks:
            texts[chunk.source].add(chunk.text)
    for source, facts in store.sources().items():
        assert texts[source] == {f"{facts.digest} {i}" for i in range(5)}
    print(f"{KILLS} kills, version {store.version}, {len(texts)} documents")
