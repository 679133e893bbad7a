"""The loader of INI files keeps the contract of loaders."""

import ini_loader

from agentmesh.testing.contracts import LoaderContract


class TestIni(LoaderContract):
    """With a file of two sections."""

    name = "settings.ini"
    data = b"[server]\nport = 8000\n\n[tea]\ntime = four\n"
    holds = "port: 8000"

    def make(self):
        """The function."""
        return ini_loader.read
