"""Many steps, one embedder: texts that wait at the same time are embedded in one call."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_TEXTS = 2048  # in one call: enough to sort by length, few enough that nobody waits long behind a large pack

Vectors = NDArray[np.float32]


class DocumentEmbedder(Protocol):
    """What is needed of an embedder."""

    remote: bool

    def documents(self, texts: Sequence[str]) -> Vectors: ...


@dataclass(slots=True, eq=False)
class _Request:
    texts: Sequence[str]
    on_progress: Callable[[int], None]
    taken: int = 0
    rows: list[Vectors] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def ended(self) -> bool:
        return self.error is not None or sum(len(r) for r in self.rows) == len(self.texts)


class EmbeddingBatcher:
    """An embedder that its callers share: one of them embeds for all that wait, as in a group commit.

    Args:
        max_texts: in one call of the embedder.
    """

    def __init__(self, embedder: DocumentEmbedder, *, max_texts: int = MAX_TEXTS) -> None:
        self._embedder, self._max_texts = embedder, max_texts
        self._waiting: deque[_Request] = deque()
        self._lock = threading.Lock()  # of the queue
        self._turn = threading.Lock()  # held by the caller that embeds

    def documents(self, texts: Sequence[str], on_progress: Callable[[int], None] = lambda done: None) -> Vectors:
        """float32 (n, d), in the order of the texts; blocks until all are embedded.

        Args:
            on_progress: called after each call of the embedder, with how many of the texts are embedded.

        Raises:
            Exception: whatever the embedder raised on a batch with some of these texts.
        """
        if not texts:
            return np.zeros((0, 0), np.float32)
        request = _Request(texts, on_progress)
        if self._embedder.remote:  # a server batches itself: callers ask it concurrently
            for at in range(0, len(texts), self._max_texts):
                self._add_rows(request, self._embedder.documents(texts[at : at + self._max_texts]))
            return np.concatenate(request.rows)
        with self._lock:
            self._waiting.append(request)
        with self._turn:
            while not request.ended:
                self._embed_next()
        if request.error is not None:
            raise request.error
        return np.concatenate(request.rows)

    def _embed_next(self) -> None:
        """One call of the embedder, for those that have waited longest."""
        batch: list[tuple[_Request, int]] = []
        texts: list[str] = []
        with self._lock:
            while self._waiting and len(texts) < self._max_texts:
                first = self._waiting[0]
                n = min(self._max_texts - len(texts), len(first.texts) - first.taken)
                texts += first.texts[first.taken : first.taken + n]
                first.taken += n
                batch.append((first, n))
                if first.taken == len(first.texts):
                    self._waiting.popleft()
        try:
            vectors = self._embedder.documents(texts)  # (n, d)
        except Exception as e:
            self._fail(batch, e)
            return
        at = 0
        for request, n in batch:
            self._add_rows(request, vectors[at : at + n])
            at += n

    def _fail(self, batch: list[tuple[_Request, int]], error: Exception) -> None:
        """Find whose texts failed: where several waited, each is embedded again on its own; a single one has the error."""
        for request, n in batch:
            if len(batch) > 1:
                try:
                    self._add_rows(request, self._embedder.documents(request.texts[request.taken - n : request.taken]))
                    continue
                except Exception as own:
                    error = own
            with self._lock:
                request.error = error
                if request in self._waiting:
                    self._waiting.remove(request)

    def _add_rows(self, request: _Request, rows: Vectors) -> None:
        request.rows.append(rows)
        request.on_progress(sum(len(r) for r in request.rows))
