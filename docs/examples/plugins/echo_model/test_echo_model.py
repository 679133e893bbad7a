"""The echo keeps the contract of models."""

from echo_model import Echo

from agentmesh.testing.contracts import ModelContract


class TestEcho(ModelContract):
    """It calls no tools."""

    calls_tools = False

    def make(self) -> Echo:
        """As `echo:any` makes it."""
        return Echo("any")
