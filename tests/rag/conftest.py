"""What the tests of ingest and retrieval share: a small embedder, a folder of documents, a Valkey.

Coroutine tests are driven here: LangChain's conformance suite has some, and needs no plugin for it.
"""

import asyncio
import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from agentmesh.rag.embedder import Base, Floats
from agentmesh.testing.servers import ValkeyServer, a_server


class Words(Base):
    """An embedder that counts words: nothing to load, and texts that share words are near each other."""

    name = ""

    def __init__(self, d: int = 26) -> None:
        super().__init__()
        self.width = d
        self.calls: list[int] = []

    def _embed(self, texts: Sequence[str]) -> Floats:
        self.calls.append(len(texts))
        rows = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):  # of dashes it knows nothing
                row[int(hashlib.md5(word.encode()).hexdigest(), 16) % self.width] += 1
        return rows

    def _identity(self) -> dict[str, str]:
        return {"name": "words"}


@pytest.fixture
def by_words() -> Words:
    """An embedder of this process."""
    return Words(64)


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
    with a_server(ValkeyServer) as server:
        yield server


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True
