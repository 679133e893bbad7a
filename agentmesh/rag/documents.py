"""Documents as loaders parse them, chunks as the store holds them, hits as searches return them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

Value = str | int | float | bool | datetime | Sequence[str]
"""The value of a metadata field."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading in a document."""

    start: int  # in characters
    level: int  # 1 is the outermost
    text: str
    end: int  # where its line, or its underline, ends; in characters


@dataclass(frozen=True, slots=True)
class Part:
    """A page or a row of a document: from `start` to the start of the next part."""

    start: int  # in characters
    metadata: Mapping[str, Value] = field(default_factory=dict)
    alone: bool = False  # no chunk crosses its start or its end


@dataclass(frozen=True, slots=True)
class Document:
    """The parsed text of a file; headings and parts are sorted by their starts."""

    text: str
    headings: tuple[Heading, ...] = ()
    parts: tuple[Part, ...] = ()
    metadata: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A passage of a document, as the store holds it.

    `text` is `[start:end]` of the document's parsed text, so that a quote can be verified.
    """

    id: str
    text: str
    source: str = ""
    start: int = 0  # in characters of the parsed text
    heading: tuple[str, ...] = ()  # the headings above it, the outermost first
    metadata: Mapping[str, Value] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Where the passage ends in the parsed text."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk that a search returns; `score` is the cosine to the query in every kind of search, higher is better."""

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
