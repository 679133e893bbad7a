"""LangChain both ways: its models, tools, loaders, splitters and embeddings as ours, our store as a VectorStore.

`FaissVectorStore` loads FAISS, and so is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentmesh.langchain.chat import answer_of, as_model, as_tool, from_langchain, to_langchain

if TYPE_CHECKING:
    from agentmesh.langchain.documents import as_embeddings, as_splitter, load_with
    from agentmesh.langchain.legacy_import import import_folder
    from agentmesh.langchain.vectorstore import FaissVectorStore

__all__ = [
    "FaissVectorStore",
    "answer_of",
    "as_embeddings",
    "as_model",
    "as_splitter",
    "as_tool",
    "from_langchain",
    "import_folder",
    "load_with",
    "to_langchain",
]
_LAZY = {
    "FaissVectorStore": "vectorstore",
    "as_embeddings": "documents",
    "as_splitter": "documents",
    "import_folder": "legacy_import",
    "load_with": "documents",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"agentmesh.langchain.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'agentmesh.langchain' has no attribute {name!r}")
