"""What the steps of an ingest answer: small, for the journal; texts and vectors are in parts, named here."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel


class Failure(BaseModel):
    """A document that is not in the store, and why."""

    source: str
    why: str


class Planned(BaseModel):
    """What there is to do; `refused` says why nothing is done."""

    parts: str = ""
    packs: list[str] = []
    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    vanished: str = ""  # the part that lists them
    failed: list[Failure] = []
    refused: str = ""


class Batch(BaseModel):
    """Chunks that are embedded and committed together."""

    part: str
    chunks: int


class Parsed(BaseModel):
    """A pack as chunks."""

    batches: list[Batch]
    bytes: int
    failed: list[Failure] = []


class Embedded(BaseModel):
    """The vectors of a batch, without those of the documents that failed."""

    part: str
    by: str = ""  # the part that says whose vectors they are; "" where there are none
    failed: list[Failure] = []


class Indexed(BaseModel):
    """What a batch brought into the store; a document in several batches counts with its last."""

    documents: int
    chunks: int
    failed: list[Failure] = []


def blamed(documents: Sequence[Mapping[str, Any]], why: str) -> list[Failure]:
    """All documents of a pack or batch, for one reason."""
    return [Failure(source=one["source"], why=why) for one in documents]
