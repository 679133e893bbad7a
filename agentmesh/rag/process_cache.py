"""What a process has of embedders and stores: each is opened once, by name, and again after a fork."""

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

LOCAL_PREFIX = "here:"  # an embedder that was given as an object: other processes do not have it
_LOCK = threading.Lock()
_REGISTERED: dict[str, Any] = {}
_BATCHERS: dict[tuple[int, int], EmbeddingBatcher] = {}  # embedders are never let go, so that an id is one's own
_NAMED_STORES: dict[tuple[int, str], VectorStore] = {}


def _store_bytes(_: tuple[int, str, Any], store: FaissStore) -> int:
    return 64 * 1024 + store.memory_bytes


_STORES: SizedCache[tuple[int, str, Any], FaissStore] = SizedCache("stores", 256 * MIB, _store_bytes)


def register_embedder(given: Any) -> str:
    """A name for an embedder object, good in this process alone."""
    name = f"{LOCAL_PREFIX}{os.getpid()}-{id(given)}"
    _REGISTERED[name] = embedder(given)
    return name


def embedder_of(name: str) -> Embedder:
    """The embedder of a name.

    Raises:
        ConfigError: it was lent by a process that is not this one.
    """
    if not name.startswith(LOCAL_PREFIX):
        return embedder(name)
    if name not in _REGISTERED:
        raise ConfigError(
            "the embedder was given as an object, which another process does not have",
            hint="add the documents again, or name it: 'wordllama', 'local:NAME', 'openai:NAME'",
        )
    found: Embedder = _REGISTERED[name]
    return found


def embedder_for(store: str, name: str) -> Embedder:
    """The embedder of a name; without one the store's own, and for a new store the default."""
    if name:
        return embedder_of(name)
    known = store_of(store).identity
    return embedder_of(known.name if known is not None else DEFAULT_EMBEDDER)


def batcher_for(by: Embedder) -> EmbeddingBatcher:
    """An embedder, as this process's steps share it."""
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
            _NAMED_STORES[key] = plugins.make("stores", name, rest)
        return _NAMED_STORES[key]


def store_of(path: str, identity: Any = None) -> FaissStore:
    """The store of a folder; one a process and identity.

    An evicted store is opened again at its next use; whoever works with it meanwhile goes on doing so.
    """
    key = os.getpid(), path, identity
    with _LOCK:
        store = _STORES.get(key) or FaissStore(path, identity=identity)
        _STORES.put(key, store)  # weighed anew: it grows as it is read and written
        return store
