"""What the tests of this folder share: a small embedder, made chunks, an empty store, a folder of documents, a Valkey.

Coroutine tests are driven here: LangChain's conformance suite has some, and needs no plugin for it.
"""

import asyncio
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh.rag.documents import Chunk
from agentmesh.rag.embedders.base import BaseEmbedder, Floats
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.testing.servers import ValkeyServer, running_server


class Words(BaseEmbedder):
    """An embedder that counts words: nothing to load, and texts that share words are near each other."""

    name = ""

    def __init__(self, d: int = 26) -> None:
        super().__init__()
        self.width = d
        self.calls: list[int] = []

    def embed(self, texts: Sequence[str]) -> Floats:
        self.calls.append(len(texts))
        rows = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):  # of dashes it knows nothing
                row[int(hashlib.md5(word.encode()).hexdigest(), 16) % self.width] += 1
        return rows

    def describe(self) -> dict[str, str]:
        return {"name": "words"}


@pytest.fixture
def by_words() -> Words:
    """An embedder of this process."""
    return Words(64)


class Made:
    """Chunks of a source, and vectors for them."""

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
def made() -> Made:
    """`store.replace("a", made.chunks("a", 2), made.vectors(2), digest="1")`, or `made.fill(store, 3)`."""
    return Made()


@pytest.fixture
def store(tmp_path: Path) -> FaissStore:
    """A new one, not yet on disk."""
    return FaissStore(tmp_path / "kb")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """`write("docs", {"a.md": "text"})` writes files below the test's folder; answers the folder."""

    def files(folder: str, texts: dict[str, str | bytes]) -> Path:
        for name, text in texts.items():
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / folder

    return files


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey of the module's own."""
    with running_server(ValkeyServer) as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True
