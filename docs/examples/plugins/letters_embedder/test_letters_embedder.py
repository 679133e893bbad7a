"""Letters keeps the contract of embedders."""

from letters_embedder import Letters

from agentmesh.testing.contracts import EmbedderContract


class TestLetters(EmbedderContract):
    """As an object, which has no name yet."""

    def make(self) -> Letters:
        """As `letters:any` makes it."""
        return Letters("any")
