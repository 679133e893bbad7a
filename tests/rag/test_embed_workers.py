"""`agentmesh rag add` beside another worker that embeds, and after that worker was killed."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli.rag_add import add_documents
from agentmesh.testing.hosts import children
from agentmesh.testing.servers import ValkeyServer
from agentmesh.worker import standby

EMBED_WORKER = ("worker", "agentmesh.rag.ingest", "--queue", "embed", "--log", "text")
WAIT_S = 60


@pytest.fixture
def worker(shell: Any, valkey: ValkeyServer, eventually: Any) -> "Iterator[subprocess.Popen[str]]":
    """A worker that consumes the queue `embed`; it is stopped at the end."""
    valkey.flush()
    process = shell.start(*EMBED_WORKER, "--broker", valkey.broker_url)
    try:
        app = standby.make_app(valkey.broker_url)
        eventually(lambda: standby.consumer_count(app, "agentmesh.rag.embed"), timeout_s=WAIT_S)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)


def test_embed_steps_run_on_the_worker_that_serves_them(
    shell: Any, write: Any, valkey: ValkeyServer, worker: "subprocess.Popen[str]"
) -> None:
    write("docs", {"a.md": "tea"})
    assert shell("rag", "add", "docs", "--broker", valkey.broker_url).startswith("1 document added")
    assert "embed steps run on the worker that serves them" in shell.err
    assert "--queue index --queue parse --queue embed" in shell.err
    worker.terminate()
    _, log = worker.communicate(timeout=WAIT_S)
    assert log.count("Call embed_batch done") == 1


def test_after_that_worker_was_killed_the_command_starts_one(
    write: Any, valkey: ValkeyServer, worker: "subprocess.Popen[str]", embeddings: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(standby, "WARN_AFTER_S", 0.5)
    monkeypatch.setattr(standby, "START_AFTER_S", 3.0)
    monkeypatch.setenv("AGENTMESH_LEASE_S", "3")
    docs = write("docs", {"a.md": "tea"})

    def kill_worker() -> None:
        embeddings.requested.wait(WAIT_S)
        os.kill(worker.pid, signal.SIGSTOP)  # the supervisor would start other processes
        for pid in [*children(worker.pid).values(), worker.pid]:
            os.kill(pid, signal.SIGKILL)
        embeddings.may_reply.set()

    embeddings.may_reply.clear()
    killer = threading.Thread(target=kill_worker)
    killer.start()
    code = add_documents(
        [str(docs)], store=tmp_path / "kb", embed=embeddings.embedder, glob="", label="", size=1000, overlap=0, meta=[],
        broker=valkey.broker_url, run_id="", as_json=False, file=None,
    )  # fmt: skip
    killer.join()
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "no worker serves queue 'embed'; starting one here, on the CPU" in err
    assert out == "1 document added, 1 passage · 0 unchanged\n"


def test_a_queue_without_a_worker_is_reported(shell: Any, write: Any, valkey: ValkeyServer) -> None:
    valkey.flush()
    write("docs", {"a.md": "tea"})
    process = shell.start("rag", "add", "docs", "--broker", valkey.broker_url, "--queue", "index", "--queue", "parse")
    assert process.stderr is not None
    for line in process.stderr:
        if "they wait for one" in line:
            break
    else:
        pytest.fail("the waiting steps were not reported")
    assert "no worker takes 'embed' steps (agentmesh.rag.embed)" in line
    assert "agentmesh worker agentmesh.rag.ingest --queue embed" in line
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
