"""An ingest whose workers are killed: in the end the store holds what an ingest without kills puts into it.

Real worker processes of both pools under a supervisor, a real embeddings server; the oracle is a second store.
"""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

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


def contents(folder: Path) -> dict[str, Any]:
    """All chunks of a store by id; fails when two have one id."""
    store = FaissStore(folder)
    chunks = [chunk for batch in store.iterate() for chunk in batch]
    by_id = {c.id: (c.text, c.source, c.start, c.heading) for c in chunks}
    assert len(by_id) == len(chunks) == store.count()
    return by_id


def worker_pids(supervisor: Supervisor) -> list[int]:
    """The workers, and the children of the prefork pool."""
    pids = list(supervisor.pids.values())
    for pid in list(pids):
        for thread in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += [int(child) for child in thread.read_text().split()]
    return pids


def print_hang(run: Run[Any], supervisor: Supervisor, log: Path) -> None:
    """Print what waits, the stacks of each process (by faulthandler, on SIGABRT), and the workers' log."""
    journal = run.aio.client.journal
    print("counts:", run_sync(journal.counts()), "open:", run_sync(journal._open(run.run_id)))  # type: ignore[attr-defined]
    for pid in worker_pids(supervisor):
        print("aborting", pid)
        os.kill(pid, signal.SIGABRT)
    time.sleep(1)  # for the dumps
    print(log.read_text(errors="replace"))


def test_after_kills_of_workers_the_store_is_the_same_as_without(
    tmp_path: Path, write: Any, embeddings: Any, valkey: ValkeyServer
) -> None:
    embeddings.latency_s = LATENCY_S
    docs = write(
        "docs", {f"{i:03}.md": f"# Number {i}\n\n{'word ' * 30}\n\n{i} is even or odd." for i in range(DOCUMENTS)}
    )
    quiet = Retriever.open(tmp_path / "quiet", embed=embeddings.embedder)
    agent, request = quiet.ingest(docs, size=160, overlap=0)
    assert FakeMesh(Crew(agent)).run(request).documents == DOCUMENTS

    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=2.0, sweep_s=0.2, drain_s=3.0)
    mesh = Mesh(load_crew(CREW), config=config)
    log = (tmp_path / "workers.log").open("wb")
    supervisor = Supervisor(
        worker_commands(config, {CREW: mesh.crew}, log="text"), drain_s=5, output=log, env={"PYTHONFAULTHANDLER": "1"},
        on_death=release_on_death(config, mesh.crew.queues.broker_names()),
    )  # fmt: skip
    retriever = Retriever.open(tmp_path / "store", embed=embeddings.embedder)
    agent, request = retriever.ingest(docs, size=160, overlap=0, window=2)
    rng = random.Random(5)
    supervisor.start()
    try:
        assert supervisor.wait_ready(60)  # with a load of 16 on two cores it took more than 30
        run = mesh.start(agent, request)
        kills = 0
        while kills < KILLS and run.status() == "open":
            time.sleep(rng.uniform(0.1, 0.35))  # between two kills
            victims = worker_pids(supervisor)
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills += 1
        until = time.monotonic() + 60
        while run.status() == "open" and time.monotonic() < until:
            for (
                item
            ) in run.waiting_for():  # a step that was alone in flight at three kills: retry it, as a person would
                run.resolve(item, "retry")
            run_sync(run.aio.client.journal.watch(run.run_id, version=None, timeout_s=0.2))
        if run.status() == "open":
            print_hang(run, supervisor, Path(log.name))
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
    digests = {s: f.digest for s, f in FaissStore(tmp_path / "store").sources().items()}
    assert digests == {s: f.digest for s, f in FaissStore(tmp_path / "quiet").sources().items()}
    assert os.listdir(tmp_path / "store" / "parts") == []
