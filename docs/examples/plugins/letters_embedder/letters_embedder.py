"""Vectors that count letters, so that texts about the same words are near: `letters:any`."""

from string import ascii_lowercase

from agentmesh.rag.embedders.base import BaseEmbedder


class Letters(BaseEmbedder):
    """26 numbers a text, and one that keeps a text without letters from being zero."""

    def embed(self, texts: list[str]) -> list[list[float]]:
        """See BaseEmbedder."""
        return [[0.1, *[float(text.lower().count(letter)) for letter in ascii_lowercase]] for text in texts]
