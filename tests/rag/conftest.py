"""Fixtures of the retrieval tests: a small embedder, sample chunks, an empty store, files, an embeddings server, a Valkey.

Coroutine tests run here too, without a plugin: LangChain's conformance suite has some.
"""

import asyncio
import contextlib
import hashlib
import inspect
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh.rag.documents import Chunk
from agentmesh.rag.embedders.base import BaseEmbedder, Floats
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.testing.servers import ValkeyServer, running_server


class Words(BaseEmbedder):
    """An embedder that counts words: it loads nothing, and texts that share words are similar."""

    name = ""

    def __init__(self, d: int = 26) -> None:
        super().__init__()
        self.width = d
        self.calls: list[int] = []

    def embed(self, texts: Sequence[str]) -> Floats:
        self.calls.append(len(texts))
        rows = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):  # a text of dashes has no words
                row[int(hashlib.md5(word.encode()).hexdigest(), 16) % self.width] += 1
        return rows

    def describe(self) -> dict[str, str]:
        return {"name": "words"}


@pytest.fixture
def by_words() -> Words:
    """An embedder of this process."""
    return Words(64)


class Samples:
    """Sample chunks of a source, and random vectors."""

    d = 8

    @staticmethod
    def chunks(source: str, n: int, text: str = "text", /, **fields: Any) -> list[Chunk]:
        return [Chunk(f"{source}#{i}", f"{text} {i}", source, 10 * i, ("Title",), fields) for i in range(n)]

    def vectors(self, n: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((n, self.d)).astype(np.float32)

    def fill(self, store: FaissStore, sources: int, n: int = 3, digest: str = "1", **fields: Any) -> None:
        for s in range(sources):
            store.replace(f"s{s}", self.chunks(f"s{s}", n, f"s{s}", **fields), self.vectors(n, s), digest=digest)


@pytest.fixture
def samples() -> Samples:
    """`store.replace("a", samples.chunks("a", 2), samples.vectors(2), digest="1")`, or `samples.fill(store, 3)`."""
    return Samples()


@pytest.fixture
def store(tmp_path: Path) -> FaissStore:
    """A new store, not yet on disk."""
    return FaissStore(tmp_path / "kb")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("docs", {"a.md": "text"})` writes files below the test's folder and returns that folder."""

    def files(folder: str, texts: dict[str, str | bytes]) -> Path:
        for name, text in texts.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / folder

    return files


class EmbeddingsServer(ThreadingHTTPServer):
    """`/v1/embeddings` on loopback: a vector made of each text's hash.

    Attributes:
        requested: set by the first request.
        may_reply: no request is answered before it is set; set unless a test clears it.
        latency_s: before each reply to several texts.
    """

    request_queue_size = 64  # a connection refused by a full backlog would be retried after a second, then ever later

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _EmbeddingsHandler)
        self.requested, self.may_reply, self.latency_s = threading.Event(), threading.Event(), 0.0
        self.may_reply.set()

    @property
    def embedder(self) -> str:
        """The name of the embedder behind this server."""
        return f"http://127.0.0.1:{self.server_port}/v1#made"


class _EmbeddingsHandler(BaseHTTPRequestHandler):
    server: EmbeddingsServer

    def do_POST(self) -> None:
        texts = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        texts = [texts] if isinstance(texts, str) else texts
        self.server.requested.set()
        self.server.may_reply.wait(60)
        time.sleep(self.server.latency_s if len(texts) > 1 else 0)
        rows = [[b / 255 + 0.01 for b in hashlib.sha256(t.encode()).digest()[:16]] for t in texts]
        body = json.dumps({"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client was killed
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def embeddings() -> Iterator[EmbeddingsServer]:
    """A server of embeddings, in a thread of this process."""
    server = EmbeddingsServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.may_reply.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey for the tests of one module."""
    with running_server(ValkeyServer) as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    parameters = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in parameters}))
    return True
