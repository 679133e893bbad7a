"""WordLlama: word vectors that come inside a package, so that search works offline and at once.

Source: https://github.com/dleemiller/WordLlama
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from agentmesh.errors import ExtraMissing
from agentmesh.rag.embed import DEFAULT, Base

try:
    import wordllama
except ImportError:
    raise ExtraMissing(
        "the embedder 'wordllama' is not installed: pip install 'agentmesh-celery[rag]', or name another with embed="
    ) from None


class WordLlama(Base):
    """256 numbers a text, about a thousand chunks a second on one core, no network."""

    name = DEFAULT

    def __init__(self) -> None:
        super().__init__()
        self._model: Any = None

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self._loaded().tokenizer.encode(text, add_special_tokens=False).ids)

    def _loaded(self) -> Any:
        with self._lock:
            if self._model is None:
                folder = Path(wordllama.__file__).parent  # the package's own weights: nothing is fetched
                self._model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
            return self._model

    def _embed(self, texts: list[str]) -> Any:
        model = self._loaded()
        with self._lock:  # its tokenizer pads by a setting of the object
            return model.embed(texts, norm=False)

    def _identity(self) -> dict[str, str]:
        return {"name": self.name, "revision": version("wordllama"), "pooling": "mean"}
