"""What is read, kept and found: documents, chunks of them with the place each was taken from, hits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

Value = str | int | float | bool | datetime | Sequence[str]
"""What a metadata field may hold."""


@dataclass(frozen=True, slots=True)
class Heading:
    """A title inside a document."""

    start: int  # in characters
    level: int  # 1 is the outermost
    text: str
    end: int  # where its line, or its underline, ends


@dataclass(frozen=True, slots=True)
class Part:
    """From `start` to the next part: a page, a row."""

    start: int
    metadata: Mapping[str, Value] = field(default_factory=dict)
    alone: bool = False  # no chunk reaches into it from before, nor out of it


@dataclass(frozen=True, slots=True)
class Document:
    """The text of a file, as it was parsed; headings and parts in the order of their starts."""

    text: str
    headings: tuple[Heading, ...] = ()
    parts: tuple[Part, ...] = ()
    metadata: Mapping[str, Value] = field(default_factory=dict)


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


def without_surrogates(text: str) -> str:
    """A text that can be written: half a surrogate pair, which JSON may hold, becomes `?`."""
    return text if text.isascii() else text.encode(errors="replace").decode()
