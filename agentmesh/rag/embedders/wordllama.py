"""WordLlama: word vectors that are part of a package, so that search works offline.

Source: https://github.com/dleemiller/WordLlama
"""

import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from agentmesh.errors import ConfigError, ExtraMissing
from agentmesh.rag.embedders.base import DEFAULT_EMBEDDER, BaseEmbedder, Floats

_root = logging.getLogger()
_level, _handlers = _root.level, list(_root.handlers)
try:
    import wordllama
except ImportError:
    raise ExtraMissing(
        "the embedder 'wordllama' is not installed",
        hint="run: pip install 'agentmesh-celery[rag]', or name another with embed=",
    ) from None
finally:
    # importing it configures the root logger
    _root.setLevel(_level)
    for _handler in [h for h in _root.handlers if h not in _handlers]:
        _root.removeHandler(_handler)

BATCH_CHARACTERS = 100_000  # padding included; each of about 25,000 tokens takes 1 KiB while it is embedded


class WordLlama(BaseEmbedder):
    """256 numbers a text, about 1,000 chunks a second on one core (`python bench/rag_ingest.py`), no network."""

    name = DEFAULT_EMBEDDER

    def __init__(self, model: str = "") -> None:
        if model:
            raise ConfigError(
                f"unknown embedder '{DEFAULT_EMBEDDER}:{model}'", hint=f"write {DEFAULT_EMBEDDER!r} alone"
            )
        super().__init__()
        self._model: Any = None

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self._loaded().tokenizer.encode(text, add_special_tokens=False).ids)

    def _loaded(self) -> Any:
        with self._lock:
            if self._model is None:
                folder = Path(wordllama.__file__).parent  # the package's own weights: nothing is downloaded
                self._model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
            return self._model

    def embed(self, texts: list[str]) -> Any:
        """See BaseEmbedder."""
        model = self._loaded()
        out: Floats | None = None
        for batch in _batches(texts):
            vectors = model.embed([texts[i] for i in batch], norm=False, batch_size=len(batch))
            if out is None:
                out = np.empty((len(texts), vectors.shape[1]), np.float32)
            out[batch] = vectors
        return out

    def describe(self) -> dict[str, str]:
        """See BaseEmbedder."""
        return {"name": self.name, "revision": version("wordllama"), "pooling": "mean"}


def _batches(texts: list[str]) -> Iterator[list[int]]:
    """Positions of texts of similar length, for all in a batch are padded to the longest."""
    batch: list[int] = []
    for i in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if batch and ((len(batch) + 1) * len(texts[i]) > BATCH_CHARACTERS or len(batch) == 256):
            yield batch
            batch = []
        batch.append(i)
    yield batch
