"""An embedder by its name. The kinds stand beside, one a file, and are imported when they are first named: one may bring torch."""

import os
import threading
from importlib import import_module
from typing import Any

from agentmesh.errors import ConfigError, did_you_mean
from agentmesh.rag.embedders.base import DEFAULT_EMBEDDER, Embedder

PROVIDERS = ("wordllama", "local", "openai", "http", "https")

_made: dict[str, Embedder] = {}
_single_process = False  # whether this process keeps its GPU for an encoder that it has made
_making = threading.Lock()


def _after_fork() -> None:
    """A child has no use for a lock that its parent's threads may hold."""
    global _making  # noqa: PLW0603
    _making = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def embedder(wanted: Any = DEFAULT_EMBEDDER, *, single_process: bool = False) -> Embedder:
    """An embedder by name, one a name and process; an embedder is itself; LangChain's Embeddings are wrapped.

    Args:
        wanted: `wordllama` (offline), `local:NAME` (a folder, or a model of the cache or of the hub's own cache),
            `openai:text-embedding-3-small`, `http://localhost:8000/v1#MODEL` (any OpenAI-compatible server).
        alone: this process keeps its GPU for this local encoder; those it makes later are on the CPU.

    Raises:
        ConfigError: no such embedder, or what it needs is not there.
    """
    global _single_process  # noqa: PLW0603
    if not isinstance(wanted, str):
        if callable(getattr(wanted, "documents", None)) and callable(getattr(wanted, "query", None)):
            own: Embedder = wanted
            return own
        if any(c.__module__.startswith("langchain_core.embeddings") for c in type(wanted).__mro__):
            wrapped: Embedder = import_module("agentmesh.rag.embedders.langchain").LangChainEmbedder(wanted)
            return wrapped
        raise ConfigError(
            f"{type(wanted).__name__} is not an embedder",
            hint="pass a name such as 'wordllama', or LangChain Embeddings",
        )
    with _making:
        if wanted not in _made:
            _made[wanted] = _make_embedder(wanted)
        _single_process = _single_process or single_process
        return _made[wanted]


def _make_embedder(name: str) -> Embedder:
    provider, _, rest = name.partition(":")
    kind = "http" if provider in ("openai", "https") else provider
    if provider not in PROVIDERS or (kind == "wordllama") == bool(rest):
        hint = did_you_mean(provider, PROVIDERS)
        raise ConfigError(
            f"unknown embedder {name!r}", hint=f"use 'wordllama', 'local:NAME', 'openai:NAME' or a server's URL.{hint}"
        )
    if kind == "wordllama":
        made: Embedder = import_module("agentmesh.rag.embedders.wordllama").WordLlama()
    elif kind == "local":
        made = import_module("agentmesh.rag.embedders.encoder").Encoder(rest, device="cpu" if _single_process else "")
    else:
        made = import_module("agentmesh.rag.embedders.http").HttpEmbedder(name)
    return made
