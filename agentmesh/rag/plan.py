"""What an ingest has to do: what the store has already is skipped, the rest is cut into packs. Reads; writes parts alone."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from agentmesh.rag.listing import Found, Listing
from agentmesh.schema import digest

PACK_DOCUMENTS, PACK_BYTES = 64, 1 << 20
READ_BYTES = 1 << 20


class How(BaseModel):
    """How documents become chunks; a change of it indexes them anew.

    Args:
        size: characters in a chunk, at most.
        overlap: characters that a chunk shares with the one before.
        metadata: given to every chunk, as JSON; a datetime is `{"$date": …}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = 1000
    overlap: int = 150
    encoding: str = "utf-8"
    metadata: dict[str, Any] = {}

    def mark(self) -> str:
        """What tells one way from another."""
        return digest(self.model_dump(mode="json"))


class Asked(BaseModel):
    """What an ingest is to add: the task of `Ingest`.

    Args:
        paths: absolute folders and files, as the workers see them.
        glob: which files of the folders; "" is all that a loader knows.
        label: what sources begin with; "" is each folder's own name.
        sync: documents that vanished below the folders leave the store.
        force: also when a folder is empty, or more than half of its documents vanished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: list[str]
    glob: str = ""
    label: str = ""
    sync: bool = False
    force: bool = False


class Todo(BaseModel):
    """A document to be read and indexed; `expects` is the digest that the store has of it, "" for none."""

    source: str
    path: str
    root: str
    size: int
    mtime_ns: int
    expects: str = ""


class Facts(Protocol):
    """What the store knows of a source."""

    @property
    def digest(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


def content_digest(data: bytes, how: str) -> str:
    """What a document's digest in the store is: of its bytes, and of how they are cut."""
    return f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.{how}"


def unchanged(found: Found, known: Facts | None, how: str) -> bool:
    """Whether the store has the document as it is: by size and time, and only where these differ by its bytes."""
    if known is None or known.facts.get("how") != how:
        return False
    if (known.facts.get("size"), known.facts.get("mtime_ns")) == (found.size, found.mtime_ns):
        return True
    return known.facts.get("size") == found.size and known.digest == _file_digest(found.path, how)


def _file_digest(path: str, how: str) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                hasher.update(piece)
    except OSError:
        return ""  # the step that parses it says so
    return f"{hasher.hexdigest()}.{how}"


def todo(listing: Listing, known: Mapping[str, Facts], how: str) -> Iterator[Todo]:
    """The documents that the store does not have as they are, one by one: to tell may take the reading of a file."""
    for f in listing.found.values():
        if not unchanged(f, known.get(f.source), how):
            yield Todo(
                source=f.source, path=f.path, root=f.root, size=f.size, mtime_ns=f.mtime_ns,
                expects=known[f.source].digest if f.source in known else "",
            )  # fmt: skip


def packs(documents: Sequence[Todo]) -> list[list[Todo]]:
    """Cut into packs of at most 64 documents or 1 MiB; a larger document is a pack of its own."""
    found: list[list[Todo]] = []
    size = PACK_BYTES
    for one in documents:
        if not found or len(found[-1]) == PACK_DOCUMENTS or size + one.size > PACK_BYTES:
            found.append([])
            size = 0
        found[-1].append(one)
        size += one.size
    return found


def vanished(listing: Listing, known: Mapping[str, Facts], wanted: Callable[[str], bool]) -> dict[str, str]:
    """Sources that were added from the listed folders and are not there now, each with its digest in the store."""
    gone: dict[str, str] = {}
    for label, root in listing.roots.items():
        for source in _below(label, root, known):
            unread = any(source.startswith(u) for u in listing.unread)  # a folder that is shut hides what is in it
            if source not in listing.found and not unread and wanted(source[len(label) + 1 :]):
                gone[source] = known[source].digest
    return gone


def too_much(listing: Listing, known: Mapping[str, Facts], gone: Mapping[str, str]) -> str:
    """Why these should not be removed unasked; "" where nothing speaks against it."""
    for label, root in listing.roots.items():
        had = _below(label, root, known)
        lost = [s for s in had if s in gone]
        if lost and not any(s.startswith(f"{label}/") for s in listing.found):
            return (
                f"{root} holds no document any more and the store has {len(had)} of it; nothing was removed. "
                "Is it mounted? To remove them all the same, sync with force"
            )
        if 2 * len(lost) > len(had):
            return (
                f"{len(lost)} of {len(had)} documents vanished from {root}; nothing was removed. "
                "To remove them all the same, sync with force"
            )
    return ""


def _below(label: str, root: str, known: Mapping[str, Facts]) -> list[str]:
    return [s for s, facts in known.items() if s.startswith(f"{label}/") and facts.facts.get("root") == root]


def other_root(documents: Sequence[Found], known: Mapping[str, Facts], exists: Callable[[str], bool]) -> str:
    """Why these names are taken: by a folder of the same label elsewhere that is still there; "" where they are not."""
    for one in documents:
        facts = known.get(one.source)
        root = str(facts.facts.get("root", "")) if facts is not None else ""
        if root and root != one.root and exists(root):
            return (
                f"{one.source!r} is in this store from {root}, not from {one.root}; "
                "name this folder by another label, such as label='mine'"
            )
    return ""
