"""Many steps, one embedder: texts that wait at the same time are embedded together, in batches sorted by length."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_TEXTS = 2048  # texts in one call: enough to sort, few enough that nobody waits long behind a big pack

Vectors = NDArray[np.float32]


class DocumentEmbedder(Protocol):
    """What is needed of an embedder."""

    remote: bool

    def documents(self, texts: Sequence[str]) -> Vectors: ...


@dataclass(slots=True, eq=False)
class _Request:
    texts: Sequence[str]
    said: Callable[[int], None]
    taken: int = 0
    rows: list[Vectors] = field(default_factory=list)
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.error is not None or sum(len(r) for r in self.rows) == len(self.texts)


class EmbeddingBatcher:
    """An embedder that its callers share: one of them works for all that wait, as in a group commit.

    Args:
        most: texts in one call of the embedder.
    """

    def __init__(self, embedder: DocumentEmbedder, *, most: int = MAX_TEXTS) -> None:
        self._embedder, self._most = embedder, most
        self._waiting: deque[_Request] = deque()
        self._lock = threading.Lock()  # of the queue
        self._turn = threading.Lock()  # held by the caller that works

    def documents(self, texts: Sequence[str], said: Callable[[int], None] = lambda done: None) -> Vectors:
        """float32 (n, d), in the order of the texts; blocks until they are there.

        Args:
            said: told how many of the texts are through, after each call of the embedder.

        Raises:
            Exception: whatever the embedder raised on a batch with some of these texts.
        """
        if not texts:
            return np.zeros((0, 0), np.float32)
        wish = _Request(texts, said)
        if self._embedder.remote:  # a server has batches of its own: callers go side by side
            for at in range(0, len(texts), self._most):
                self._give(wish, self._embedder.documents(texts[at : at + self._most]))
            return np.concatenate(wish.rows)
        with self._lock:
            self._waiting.append(wish)
        with self._turn:
            while not wish.over:
                self._work()
        if wish.error is not None:
            raise wish.error
        return np.concatenate(wish.rows)

    def _work(self) -> None:
        """One call of the embedder, for those that have waited longest."""
        batch: list[tuple[_Request, int]] = []
        texts: list[str] = []
        with self._lock:
            while self._waiting and len(texts) < self._most:
                first = self._waiting[0]
                n = min(self._most - len(texts), len(first.texts) - first.taken)
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
        for wish, n in batch:
            self._give(wish, vectors[at : at + n])
            at += n

    def _fail(self, batch: list[tuple[_Request, int]], error: Exception) -> None:
        """Whose texts were it? Where several waited, each is asked for again by itself; a lone one has its error."""
        for wish, n in batch:
            if len(batch) > 1:
                try:
                    self._give(wish, self._embedder.documents(wish.texts[wish.taken - n : wish.taken]))
                    continue
                except Exception as own:
                    error = own
            with self._lock:
                wish.error = error
                if wish in self._waiting:
                    self._waiting.remove(wish)

    def _give(self, wish: _Request, rows: Vectors) -> None:
        wish.rows.append(rows)
        wish.said(sum(len(r) for r in wish.rows))
