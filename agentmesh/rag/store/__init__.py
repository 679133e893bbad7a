"""The FAISS store: immutable numbered segments on disk, followed by every process that searches or writes."""

from agentmesh.rag.store.faiss_store import FaissStore

__all__ = ["FaissStore"]
