"""What a store keeps and what a search finds: chunks of documents, with the place each was taken from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

Value = str | int | float | bool | datetime | Sequence[str]
"""What a metadata field may hold."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage of a document, as it is stored.

    `text` is `document[start:end]` of the parsed text, so that a quote can be checked against it.
    """

    id: str
    text: str
    source: str = ""
    start: int = 0  # in characters of the parsed text
    heading: tuple[str, ...] = ()  # from the document's title inwards
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Where the passage ends in the parsed text."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that was found; `score` is the cosine, higher is better, in every kind of search."""

    id: str
    text: str
    source: str
    start: int
    score: float
    heading: tuple[str, ...] = ()
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Where the passage ends in the parsed text."""
        return self.start + len(self.text)
