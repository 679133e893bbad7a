"""From text to vectors: what an embedder is, and how a store recognises it. The kinds are in `embedders/`, one a file."""

import os
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from agentmesh.errors import EmbedderError, EmbedderMismatch, well_formed

Floats = NDArray[np.float32]
PROBE_TEXT = "The quick brown fox jumps over the lazy dog; 敏捷的棕色狐狸跳过懒狗。"
# cosine of two probes of one embedder: bf16 beside fp32 gives 0.9999, another pooling 0.998 at most
SAME_VECTOR = 0.999
DEFAULT_EMBEDDER = "wordllama"
# what each family was trained with before a query and before a document; source: their model cards
FAMILIES = (
    (r"\be5\b.*\binstruct\b|\be5-mistral", (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ", "")),
    (r"\be5\b", ("query: ", "passage: ")),
    (r"\bbge\b.*\ben\b", ("Represent this sentence for searching relevant passages: ", "")),
    (r"\bbge\b.*\bzh\b", ("为这个句子生成表示以用于检索相关文章：", "")),
    (r"\bnomic-embed\b", ("search_query: ", "search_document: ")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Identity:
    """What a store remembers of the embedder that filled it."""

    name: str
    revision: str = ""
    pooling: str = ""
    prefixes: tuple[str, str] = ("", "")  # before a query, before a document
    d: int = 0
    probe: tuple[float, ...] = ()  # the vector of PROBE_TEXT as a document, of unit length

    def check(self, other: "Identity") -> None:
        """Check that the other makes the same vectors; its name may differ (a folder, a server).

        Raises:
            EmbedderMismatch: it does not.
        """
        both = f"the store was filled by {self._label()} and is asked with {other._label()}"
        hint = f"use {self.name!r}, or run: agentmesh rag reembed --embed NEW"
        if self.d != other.d:
            raise EmbedderMismatch(f"{both}: vectors of {self.d} and {other.d} numbers", hint=hint)
        if self.probe and other.probe:
            cosine = float(np.dot(np.asarray(self.probe), np.asarray(other.probe)))
            if not cosine >= SAME_VECTOR:
                raise EmbedderMismatch(f"{both}: the same sentence has a cosine of {cosine:.3f}", hint=hint)
        if self.prefixes != other.prefixes:
            raise EmbedderMismatch(f"{both}: prefixes {self.prefixes!r} and {other.prefixes!r}", hint=hint)

    def to_json(self) -> dict[str, Any]:
        """For the store's own file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The identity again."""
        query, document = data.get("prefixes", ("", ""))
        rest = {k: data[k] for k in ("revision", "pooling", "d") if k in data}
        return cls(name=data["name"], prefixes=(query, document), probe=tuple(data.get("probe", ())), **rest)

    def _label(self) -> str:
        return repr(self.name) + (f" ({self.revision[:12]})" if self.revision else "")


class Embedder(Protocol):
    """Text in, vectors of unit length out. Loads at its first use; one object serves many threads.

    A plugin's is a subclass of BaseEmbedder, declared in the entry-point group `agentmesh.embedders`.
    """

    name: str
    """What makes it again in another process, as `embedder(name)`; empty for an object without such a name."""
    remote: bool
    """Whether it computes in another process or machine, so that concurrent calls help."""

    @property
    def d(self) -> int:
        """The width of its vectors."""
        ...

    @property
    def identity(self) -> Identity:
        """What a store remembers; the first call embeds a sentence."""
        ...

    def documents(self, texts: Sequence[str]) -> Floats:
        """float32 (n, d), rows of unit length in the order of the texts; (0, d) for none."""
        ...

    def query(self, text: str) -> Floats:
        """float32 (d,), of unit length."""
        ...


class BaseEmbedder:
    """What the kinds share: prefixes, unit length, the probe. A kind needs `embed`, and nothing else.

    Args:
        model: the text after the colon in `provider:model`.

    Attributes:
        name: what makes it again in another process; `embedder("letters:any")` sets it, where a kind leaves it empty.
        prefixes: written before each query and before each document.
        scaled: whether vectors are brought to unit length; a store of the "cosine" metric needs that.
    """

    name: str = ""
    remote = False
    scaled = True
    prefixes = ("", "")

    def __init__(self, model: str = "") -> None:
        self.model = model
        self._lock = threading.RLock()
        self._identity: Identity | None = None
        _all.add(self)

    def embed(self, texts: list[str]) -> Any:
        """Vectors of any length, (n, d), rows in the order of the texts; numbers of any type.

        Raises:
            EmbedderError: with `after_s`, where a retry may help.
        """
        raise NotImplementedError(f"{type(self).__name__} needs `embed(texts)`")

    def describe(self) -> dict[str, str]:
        """What a store shows of it: `name`, `revision`, `pooling`."""
        return {"name": self.name}

    @property
    def d(self) -> int:
        """The width of the vectors."""
        return self.identity.d

    @property
    def identity(self) -> Identity:
        """What a store remembers; embeds one sentence the first time."""
        with self._lock:
            if self._identity is None:
                probe = self.documents([PROBE_TEXT])[0]
                probe = probe / np.linalg.norm(probe)
                description = {"revision": "", "pooling": "", **self.describe()}
                # rounded: a float32 written as JSON would be twice as long for nothing
                rounded = tuple(round(float(x), 7) for x in probe)
                self._identity = Identity(prefixes=self.prefixes, d=len(rounded), probe=rounded, **description)
            return self._identity

    def documents(self, texts: Sequence[str]) -> Floats:
        """float32 (n, d), rows of unit length in the order of the texts.

        Raises:
            EmbedderError: it gave another number of vectors, or one with NaN.
        """
        if not texts:
            return np.zeros((0, self.d), np.float32)
        return self._unit(self.embed([self.prefixes[1] + well_formed(t) for t in texts]), texts)

    def query(self, text: str) -> Floats:
        """float32 (d,), of unit length; zeros for a text in which the embedder has none of the words."""
        vector: Floats = self._unit(self.embed([self.prefixes[0] + well_formed(text)]), [text])[0]
        return vector

    def _unit(self, vectors: Any, texts: Sequence[str]) -> Floats:
        if len(vectors) != len(texts):
            raise EmbedderError(f"embedder {self.name!r} gave {len(vectors)} vectors for {len(texts)} texts")
        try:
            rows = np.array(vectors, np.float32)  # (n, d); a copy, for it is changed below
        except ValueError:
            rows = np.zeros(0, np.float32)
        if rows.ndim != 2 or not rows.shape[1]:
            raise EmbedderError(f"embedder {self.name!r} gave vectors of several widths, or of none")
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)  # (n, 1)
        bad = np.flatnonzero(~np.isfinite(lengths[:, 0]))
        if len(bad):
            raise EmbedderError(f"embedder {self.name!r} gave no numbers (NaN) for {texts[bad[0]][:60]!r}")
        if self.scaled:
            np.divide(rows, lengths, out=rows, where=lengths > 0)
        return rows


def trained_prefixes(model: str) -> tuple[str, str]:
    """What a model of this name was trained with before a query and before a document.

    >>> trained_prefixes("intfloat/multilingual-e5-small")
    ('query: ', 'passage: ')
    """
    tail = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((words for family, words in FAMILIES if re.search(family, tail)), ("", ""))


_all: "weakref.WeakSet[BaseEmbedder]" = weakref.WeakSet()


def _after_fork() -> None:
    """A child has no use for locks that its parent's threads may hold."""
    for one in list(_all):
        one._lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
