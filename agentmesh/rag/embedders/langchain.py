"""LangChain's Embeddings as an embedder of ours; imports nothing of LangChain."""

from typing import Any

from agentmesh.errors import EmbedderError, well_formed
from agentmesh.rag.embedders.base import BaseEmbedder, Floats


class LangChainEmbedder(BaseEmbedder):
    """Any LangChain Embeddings: OpenAI's, Cohere's, a server's, a fake.

    Args:
        embeddings: has `embed_documents` and `embed_query`. It stays in this process: it has no name for another one.
        scaled: to unit length; without it vectors keep their length, for a store of the "l2" metric.
    """

    name = ""
    remote = True  # most are; concurrent calls do the others no harm

    def __init__(self, embeddings: Any, *, scaled: bool = True) -> None:
        super().__init__()
        self.scaled = scaled
        self.embeddings = embeddings

    def query(self, text: str) -> Floats:
        """float32 (d,), by the embeddings' own method for queries."""
        vector: Floats = self._unit([self._call("embed_query", well_formed(text))], [text])[0]
        return vector

    def embed(self, texts: list[str]) -> Any:
        """See BaseEmbedder."""
        return self._call("embed_documents", texts)

    def _call(self, method: str, argument: Any) -> Any:
        try:
            return getattr(self.embeddings, method)(argument)
        except Exception as e:
            # it may be the server's or the package's; a step is retried
            kind = type(self.embeddings).__name__
            raise EmbedderError(f"{kind}.{method} raised {type(e).__name__}: {e}", after_s=0.0) from e

    def describe(self) -> dict[str, str]:
        """See BaseEmbedder."""
        cls = type(self.embeddings)
        model = getattr(self.embeddings, "model", None) or getattr(self.embeddings, "model_name", None) or ""
        return {
            "name": f"{cls.__module__}.{cls.__qualname__}" + (f" {model}" if isinstance(model, str) and model else "")
        }
