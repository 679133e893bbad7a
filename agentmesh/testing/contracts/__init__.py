"""Contract tests of plugins: one class for each kind of plugin. The built-in adapters pass them as well.

    class TestEcho(ModelContract):           # pytest finds the class and runs its tests
        def make(self) -> Echo:
            return Echo("any")

Without pytest: `check_model(lambda: Echo("any"))`. A broken promise raises an AssertionError that says which.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmesh.testing.contracts.base import Contract
    from agentmesh.testing.contracts.embedder import EmbedderContract, check_embedder
    from agentmesh.testing.contracts.journal import JOURNAL, LEASE_MS, JournalContract, check_journal
    from agentmesh.testing.contracts.loader import LoaderContract, check_loader
    from agentmesh.testing.contracts.model import ModelContract, check_model
    from agentmesh.testing.contracts.store import StoreContract, check_store

__all__ = [
    "JOURNAL", "LEASE_MS", "Contract", "EmbedderContract", "JournalContract", "LoaderContract", "ModelContract",
    "StoreContract", "check_embedder", "check_journal", "check_loader", "check_model", "check_store",
]  # fmt: skip
_MODULES = {
    "Contract": "base", "EmbedderContract": "embedder", "check_embedder": "embedder", "JOURNAL": "journal",
    "LEASE_MS": "journal", "JournalContract": "journal", "check_journal": "journal", "LoaderContract": "loader",
    "check_loader": "loader", "ModelContract": "model", "check_model": "model", "StoreContract": "store",
    "check_store": "store",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:  # lazily: stores bring numpy
        return getattr(import_module(f"agentmesh.testing.contracts.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'agentmesh.testing.contracts' has no attribute {name!r}")
