"""An embedder by its name. The kinds stand beside, one a file, and are imported when they are first named: one may bring torch."""

import os
import threading
from importlib import import_module
from typing import Any

from agentmesh import plugins
from agentmesh.errors import ConfigError
from agentmesh.rag.embedders.base import DEFAULT_EMBEDDER, Embedder

_embedders: dict[str, Embedder] = {}
_single_process = False  # whether this process keeps its GPU for an encoder that it has made
_making = threading.Lock()


def _after_fork() -> None:
    """A child has no use for a lock that its parent's threads may hold."""
    global _making  # noqa: PLW0603
    _making = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def embedder(embed: Any = DEFAULT_EMBEDDER, *, single_process: bool = False) -> Embedder:
    """An embedder by name, one a name and process; an embedder is itself; LangChain's Embeddings are wrapped.

    Args:
        embed: `wordllama` (offline), `local:NAME` (a folder, or a model of the cache or of the hub's own cache),
            `openai:text-embedding-3-small`, `http://localhost:8000/v1#MODEL` (any OpenAI-compatible server), or
            `NAME:TEXT` of a plugin in the entry-point group `agentmesh.embedders`, which is made as `NAME(TEXT)`.
        single_process: this process keeps its GPU for this local encoder; those it makes later are on the CPU.

    Raises:
        ConfigError: no such embedder, or what it needs is missing.
    """
    global _single_process  # noqa: PLW0603
    if not isinstance(embed, str):
        if callable(getattr(embed, "documents", None)) and callable(getattr(embed, "query", None)):
            own: Embedder = embed
            return own
        if any(c.__module__.startswith("langchain_core.embeddings") for c in type(embed).__mro__):
            wrapped: Embedder = import_module("agentmesh.rag.embedders.langchain").LangChainEmbedder(embed)
            return wrapped
        raise ConfigError(
            f"{type(embed).__name__} is not an embedder",
            hint="pass a name such as 'wordllama', or LangChain Embeddings",
        )
    with _making:
        if embed not in _embedders:
            _embedders[embed] = _make_embedder(embed)
        _single_process = _single_process or single_process
        return _embedders[embed]


def _make_embedder(name: str) -> Embedder:
    provider, _, rest = name.partition(":")
    options = {"device": "cpu"} if provider == "local" and _single_process else {}
    hint = "Write 'wordllama', 'local:NAME', 'openai:NAME' or a server's URL."
    instance: Embedder = plugins.make_plugin("embedders", provider, rest, hint=hint, **options)
    if not callable(getattr(instance, "documents", None)):
        raise ConfigError(
            f"embedder {provider!r} makes a {type(instance).__name__}, which has no `documents`",
            hint="declare a subclass of agentmesh.rag.embedders.base.BaseEmbedder",
        )
    if not getattr(instance, "name", ""):
        instance.name = name
    return instance
