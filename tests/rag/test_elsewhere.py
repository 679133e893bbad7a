"""`agentmesh rag add` beside a worker that embeds already, and when that one is gone."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli.rag_add import add_documents
from agentmesh.testing.hosts import children
from agentmesh.testing.servers import ValkeyServer
from agentmesh.worker import standby

EMBED_WORKER = ("worker", "agentmesh.rag.ingest", "--queue", "embed", "--log", "text")
WAIT_S = 60


class Embeddings(BaseHTTPRequestHandler):
    """`/v1/embeddings`: answers when it may."""

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        self.server.asked.set()  # type: ignore[attr-defined]
        self.server.may.wait(WAIT_S)  # type: ignore[attr-defined]
        rows = [
            {"index": i, "embedding": [1.0, len(t)]} for i, t in enumerate([texts] if isinstance(texts, str) else texts)
        ]
        body = json.dumps({"data": rows}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            return  # who asked was killed

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def embeddings() -> Iterator[Any]:
    """A server of embeddings: `.asked` is set by a question, none is answered before `.may` is set."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Embeddings)
    server.asked, server.may = threading.Event(), threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.may.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def worker(shell: Any, valkey: ValkeyServer) -> "Iterator[subprocess.Popen[str]]":
    """A worker of the queue `embed`, which consumes; it is stopped in the end."""
    valkey.flush()
    process = shell.start(*EMBED_WORKER, "--broker", valkey.broker_url)
    try:
        until = time.monotonic() + WAIT_S
        while not standby.consumer_count(standby.make_app(valkey.broker_url), "agentmesh.rag.embed"):
            assert time.monotonic() < until
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)


def test_embed_steps_are_left_to_a_worker_that_is_there(
    shell: Any, write: Any, valkey: ValkeyServer, worker: "subprocess.Popen[str]"
) -> None:
    write("docs", {"a.md": "tea"})
    assert shell("rag", "add", "docs", "--broker", valkey.broker_url).startswith("1 documents added")
    assert "embed steps run on the worker that serves them" in shell.err
    assert "--queue index --queue parse --queue embed" in shell.err
    worker.terminate()
    _, log = worker.communicate(timeout=WAIT_S)
    assert log.count("Call embed_batch done") == 1


def test_when_that_worker_goes_away_the_command_goes_on_by_itself(
    write: Any, valkey: ValkeyServer, worker: "subprocess.Popen[str]", embeddings: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(standby, "WARN_AFTER_S", 0.5)
    monkeypatch.setattr(standby, "START_AFTER_S", 3.0)
    monkeypatch.setenv("AGENTMESH_LEASE_S", "3")
    docs = write("docs", {"a.md": "tea"})

    def killed() -> None:
        embeddings.asked.wait(WAIT_S)
        os.kill(worker.pid, signal.SIGSTOP)  # the supervisor would start others
        for pid in [*children(worker.pid).values(), worker.pid]:
            os.kill(pid, signal.SIGKILL)
        embeddings.may.set()

    killer = threading.Thread(target=killed)
    killer.start()
    code = add_documents(
        [str(docs)], store=tmp_path / "kb", embed=f"http://127.0.0.1:{embeddings.server_port}/v1#made", glob="", label="",
        size=1000, overlap=0, meta=[], broker=valkey.broker_url, run_id="", as_json=False, file=None,
    )  # fmt: skip
    killer.join()
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "no worker serves queue 'embed'; starting one here, on the CPU" in err
    assert out == "1 documents added, 1 passages · 0 unchanged\n"


def test_steps_of_a_queue_that_nobody_serves_are_told_of(shell: Any, write: Any, valkey: ValkeyServer) -> None:
    valkey.flush()
    write("docs", {"a.md": "tea"})
    process = shell.start("rag", "add", "docs", "--broker", valkey.broker_url, "--queue", "index", "--queue", "parse")
    assert process.stderr is not None
    for line in process.stderr:
        if "they wait for one" in line:
            break
    else:
        pytest.fail("nothing was said")
    assert "no worker takes 'embed' steps (agentmesh.rag.embed)" in line
    assert "agentmesh worker agentmesh.rag.ingest --queue embed" in line
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
