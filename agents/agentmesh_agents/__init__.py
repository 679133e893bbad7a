"""Agents that come with agentmesh. The Librarian needs the `rag` extra, and is imported when it is first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentmesh_agents.reader import Note, Reader
from agentmesh_agents.writer import Page, Writer

if TYPE_CHECKING:
    from agentmesh_agents.librarian import Answer, Librarian

__all__ = ["Answer", "Librarian", "Note", "Page", "Reader", "Writer"]


def __getattr__(name: str) -> Any:
    if name in ("Answer", "Librarian"):
        return getattr(import_module("agentmesh_agents.librarian"), name)
    raise AttributeError(f"module 'agentmesh_agents' has no attribute {name!r}")
