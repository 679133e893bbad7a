"""The JSON file keeps the contract of stores."""

import tempfile
from pathlib import Path

from json_store import JsonStore

from agentmesh.testing.contracts import StoreContract


class TestJsonStore(StoreContract):
    """In a folder of its own each time."""

    def make(self):
        """A new file."""
        return JsonStore(Path(tempfile.mkdtemp()) / "store.json")

    def reopen(self, store):
        """The same file."""
        return JsonStore(store.path)
