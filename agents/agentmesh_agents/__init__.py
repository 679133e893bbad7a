"""Agents that come with agentmesh. The Librarian needs the `rag` extra, and so is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentmesh_agents.reader import Note, Reader
from agentmesh_agents.writer import Page, Writer

if TYPE_CHECKING:
    from agentmesh_agents.librarian import Librarian, QuotedAnswer

__all__ = ["Librarian", "Note", "Page", "QuotedAnswer", "Reader", "Writer"]


def __getattr__(name: str) -> Any:
    if name in ("Librarian", "QuotedAnswer"):
        return getattr(import_module("agentmesh_agents.librarian"), name)
    raise AttributeError(f"module 'agentmesh_agents' has no attribute {name!r}")
