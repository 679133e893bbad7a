"""An ingest whose workers are killed: what the store holds in the end is what an undisturbed ingest makes of it.

Real worker processes of both pools under a supervisor, a real embeddings server; the oracle is a second store.
"""

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh import Crew
from agentmesh.celery.event_loop import run_sync
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.engine.run import Run
from agentmesh.mesh import Mesh
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Retriever
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeMesh
from agentmesh.testing.servers import ValkeyServer
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.supervisor import Supervisor

CREW = "agentmesh.rag.ingest"
DOCUMENTS, KILLS, LATENCY_S = 512, 4, 0.4  # eight packs, two at a time: the kills come before the end


class Embeddings(BaseHTTPRequestHandler):
    """`/v1/embeddings`: a vector made of the text's hash, after a while."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        texts = [texts] if isinstance(texts, str) else texts
        time.sleep(LATENCY_S if len(texts) > 1 else 0)
        rows = [[b / 255 + 0.01 for b in hashlib.sha256(t.encode()).digest()[:16]] for t in texts]
        body = json.dumps({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # who is not let in at once comes again after a second, and then after ever longer


@pytest.fixture
def embed() -> Iterator[str]:
    """The name of an embedder that is a server of this process."""
    server = Server(("127.0.0.1", 0), Embeddings)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1#made"
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder: Path) -> dict[str, Any]:
    """All that a store holds, by id; an id that is there twice is an error."""
    store = FaissStore(folder)
    chunks = [chunk for batch in store.iterate() for chunk in batch]
    found = {c.id: (c.text, c.source, c.start, c.heading) for c in chunks}
    assert len(found) == len(chunks) == store.count()
    return found


def family(supervisor: Supervisor) -> list[int]:
    """The workers, and the children of the prefork pool."""
    pids = list(supervisor.pids.values())
    for pid in list(pids):
        for thread in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += [int(child) for child in thread.read_text().split()]
    return pids


def tell_of_a_hang(run: Run[Any], supervisor: Supervisor, log: Path) -> None:
    """What waits, where each process stands (faulthandler, at its abort), and what the workers said."""
    print("counts:", run_sync(run._journal.counts()), "open:", run_sync(run._journal._open(run.id)))  # type: ignore[attr-defined]
    for pid in family(supervisor):
        print("aborting", pid)
        os.kill(pid, signal.SIGABRT)
    time.sleep(1)  # for the dumps
    print(log.read_text(errors="replace"))


def test_whoever_is_killed_the_store_is_as_if_nobody_had_been(
    tmp_path: Path, write: Any, embed: str, valkey: ValkeyServer
) -> None:
    docs = write(
        "docs", {f"{i:03}.md": f"# Number {i}\n\n{'word ' * 30}\n\n{i} is even or odd." for i in range(DOCUMENTS)}
    )
    quiet = Retriever.open(tmp_path / "quiet", embed=embed)
    agent, asked = quiet.ingest(docs, size=160, overlap=0)
    assert FakeMesh(Crew(agent)).run(asked).documents == DOCUMENTS

    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=2.0, sweep_s=0.2, drain_s=3.0)
    mesh = Mesh(load_crew(CREW), config=config)
    log = (tmp_path / "workers.log").open("wb")
    supervisor = Supervisor(
        worker_commands(config, {CREW: mesh.crew}, log="text"), drain_s=5, output=log, env={"PYTHONFAULTHANDLER": "1"},
        on_death=release_on_death(config, mesh.crew.queues.broker_names()),
    )  # fmt: skip
    agent, asked = Retriever.open(tmp_path / "store", embed=embed).ingest(docs, size=160, overlap=0, window=2)
    rng = random.Random(5)
    supervisor.start()
    try:
        assert supervisor.wait_ready(60)  # with a load of 16 on two cores it took more than 30
        run = mesh.start(agent, asked)
        kills = 0
        while kills < KILLS and run.status == "open":
            time.sleep(rng.uniform(0.1, 0.35))  # the schedule of the deaths
            victims = family(supervisor)
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills += 1
        until = time.monotonic() + 60
        while run.status == "open" and time.monotonic() < until:
            for item in run.waiting_for:  # alone in hand at three deaths: a person says that it was not to blame
                run.resolve(item, "retry")
            run_sync(run._journal.watch(run.id, version=None, timeout_s=0.2))
        if run.status == "open":
            tell_of_a_hang(run, supervisor, Path(log.name))
        added = run.result(timeout_s=1)
    finally:
        supervisor.stop()
        supervisor.join(10)
        log.close()
        mesh.close()
    assert kills == KILLS
    assert (added.documents, added.failed) == (DOCUMENTS, [])
    assert contents(tmp_path / "store") == contents(tmp_path / "quiet")
    ids = sorted(contents(tmp_path / "store"))
    assert np.allclose(FaissStore(tmp_path / "store").vectors(ids), FaissStore(tmp_path / "quiet").vectors(ids))
    known = {s: f.digest for s, f in FaissStore(tmp_path / "store").sources().items()}
    assert known == {s: f.digest for s, f in FaissStore(tmp_path / "quiet").sources().items()}
    assert os.listdir(tmp_path / "store" / "parts") == []
