"""The embedders and stores of a process: each is opened once, by name, and again after a fork."""

import os
import threading
from typing import Any

from agentmesh import plugins
from agentmesh.errors import ConfigError
from agentmesh.rag.embedders import embedder
from agentmesh.rag.embedders.base import DEFAULT_EMBEDDER, Embedder
from agentmesh.rag.embedders.batcher import EmbeddingBatcher
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.vector_store import VectorStore
from agentmesh.sized_cache import MIB, SizedCache

LOCAL_PREFIX = "here:"  # of the name of an embedder that was passed as an object: other processes do not have it
_LOCK = threading.Lock()
_REGISTERED: dict[str, Any] = {}
_BATCHERS: dict[tuple[int, int], EmbeddingBatcher] = {}  # by process and id: embedders live as long as the process
_NAMED_STORES: dict[tuple[int, str], VectorStore] = {}


def _store_bytes(_: tuple[int, str, Any], store: FaissStore) -> int:
    return 64 * 1024 + store.memory_bytes


_STORES: SizedCache[tuple[int, str, Any], FaissStore] = SizedCache("stores", 256 * MIB, _store_bytes)


def register_embedder(source: Any) -> str:
    """A name for an embedder object, which is valid in this process alone."""
    name = f"{LOCAL_PREFIX}{os.getpid()}-{id(source)}"
    _REGISTERED[name] = embedder(source)
    return name


def embedder_of(name: str) -> Embedder:
    """The embedder of a name.

    Raises:
        ConfigError: it is the name of an object in another process.
    """
    if not name.startswith(LOCAL_PREFIX):
        return embedder(name)
    if name not in _REGISTERED:
        raise ConfigError(
            "the embedder was passed as an object, which this process does not have",
            hint="pass its name: 'wordllama', 'local:NAME', 'openai:NAME'; or add the documents again",
        )
    registered: Embedder = _REGISTERED[name]
    return registered


def embedder_for(store: str, name: str) -> Embedder:
    """The embedder of a name; without one the store's own, and for a new store the default."""
    if name:
        return embedder_of(name)
    identity = store_of(store).identity
    return embedder_of(identity.name if identity is not None else DEFAULT_EMBEDDER)


def batcher_for(by: Embedder) -> EmbeddingBatcher:
    """The batcher through which this process's steps share an embedder."""
    key = os.getpid(), id(by)
    with _LOCK:
        if key not in _BATCHERS:
            _BATCHERS[key] = EmbeddingBatcher(by)
        return _BATCHERS[key]


def named_store(path: str) -> VectorStore:
    """The store of a plugin that `NAME:TEXT` names; one a process and name."""
    key = os.getpid(), path
    with _LOCK:
        if key not in _NAMED_STORES:
            name, _, rest = path.partition(":")
            _NAMED_STORES[key] = plugins.make_plugin("stores", name, rest)
        return _NAMED_STORES[key]


def store_of(path: str, identity: Any = None) -> FaissStore:
    """The store of a folder; one a process and identity.

    An evicted store is opened again at its next use; callers that have it may continue to use it.
    """
    key = os.getpid(), path, identity
    with _LOCK:
        store = _STORES.get(key) or FaissStore(path, identity=identity)
        _STORES.put(key, store)  # weighed anew: it grows as it is read and written
        return store
