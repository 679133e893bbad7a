"""The documents below the roots of an ingest: each with its name in the store, its size and its time. Only lists."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from agentmesh.schema import digest

SKIPPED = frozenset({"__pycache__", "node_modules"})  # and whatever begins with a dot


@dataclass(frozen=True, slots=True)
class DocumentFile:
    """A document as it lies on disk; `source` is its root's label and its path below it."""

    source: str
    path: str
    size: int
    mtime_ns: int
    root: str


@dataclass(slots=True)
class Listing:
    """What was found below the roots; `roots` has the label of each folder, `unread` what could not be listed, and why."""

    found: dict[str, DocumentFile] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)


def matcher(glob: str) -> Callable[[str], bool]:
    """Whether a relative path fits a pattern: `**/` is any folders, `*` and `?` stay in one name.

    A pattern without `/` is of names, at any depth.
    """
    pattern = glob if "/" in glob else f"**/{glob}"
    regex = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./")):
        regex += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
    compiled = re.compile(regex)
    return lambda path: compiled.fullmatch(path) is not None


def list_documents(
    paths: Sequence[str], *, wanted: Callable[[str], bool], label: str = "", without: Iterable[str] = ()
) -> Listing:
    """The documents of these folders and files, sorted by source.

    Args:
        paths: absolute; a folder is walked, a file is taken whether it is `wanted` or not.
        wanted: of a path relative to its root.
        label: what sources begin with; a root's own name when left out.
        without: absolute folders that are not entered, such as the store's.
    """
    listing, shut = Listing(), {os.path.realpath(p) for p in without}
    for path in paths:
        root = path if os.path.isdir(path) else os.path.dirname(path)
        name = label or os.path.basename(root) or "root"
        if root == path:
            listing.roots[name] = root
            entries: Iterable[tuple[str, str]] = _walk(root, "", wanted, shut, listing, name)
        else:
            entries = [(os.path.basename(path), path)]
        for below, file in entries:
            _add_file(listing, f"{name}/{below}", file, root)
    listing.found = dict(sorted(listing.found.items()))
    return listing


def _walk(
    folder: str, below: str, wanted: Callable[[str], bool], shut: set[str], listing: Listing, name: str
) -> Iterator[tuple[str, str]]:
    """Depth first; links to folders are not followed, links to files only where they stay below the root."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda e: e.name)
    except OSError as e:
        listing.unread[f"{name}/{below}"] = f"the folder cannot be listed ({e.strerror})"
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SKIPPED:
            continue
        path = f"{below}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            if os.path.realpath(entry.path) not in shut:
                yield from _walk(entry.path, f"{path}/", wanted, shut, listing, name)
        elif wanted(path) and (not entry.is_symlink() or _stays(entry.path, folder, below)):
            yield path, entry.path


def _stays(link: str, folder: str, below: str) -> bool:
    """Whether a link leads to a file below the root."""
    root = Path(folder).resolve()
    for _ in range(below.count("/")):
        root = root.parent
    target = Path(link).resolve()
    return target.is_relative_to(root) and target.is_file()


def _add_file(listing: Listing, source: str, file: str, root: str) -> None:
    try:
        stat = os.stat(file)
    except OSError as e:
        listing.unread[source] = f"the file cannot be read ({e.strerror})"
        return
    if stat.st_size:  # an empty file has nothing to find
        listing.found[source] = DocumentFile(source, file, stat.st_size, stat.st_mtime_ns, root)


# ---- What an ingest has to do -------------------------------------------------------------------

PACK_DOCUMENTS, PACK_BYTES = 64, 1 << 20
READ_BYTES = 1 << 20


class ChunkOptions(BaseModel):
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


class IngestRequest(BaseModel):
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


class PendingDocument(BaseModel):
    """A document to be read and indexed; `expects` is the digest that the store has of it, "" for none."""

    source: str
    path: str
    root: str
    size: int
    mtime_ns: int
    expects: str = ""


class KnownSource(Protocol):
    """What the store knows of a source."""

    @property
    def digest(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


def content_digest(data: bytes, how: str) -> str:
    """What a document's digest in the store is: of its bytes, and of how they are cut."""
    return f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.{how}"


def unchanged(found: DocumentFile, known: KnownSource | None, how: str) -> bool:
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


def pending_documents(listing: Listing, known: Mapping[str, KnownSource], how: str) -> Iterator[PendingDocument]:
    """The documents that the store does not have as they are, one by one: to tell may take the reading of a file."""
    for f in listing.found.values():
        if not unchanged(f, known.get(f.source), how):
            yield PendingDocument(
                source=f.source, path=f.path, root=f.root, size=f.size, mtime_ns=f.mtime_ns,
                expects=known[f.source].digest if f.source in known else "",
            )  # fmt: skip


def split_into_packs(documents: Sequence[PendingDocument]) -> list[list[PendingDocument]]:
    """Cut into packs of at most 64 documents or 1 MiB; a larger document is a pack of its own."""
    found: list[list[PendingDocument]] = []
    size = PACK_BYTES
    for one in documents:
        if not found or len(found[-1]) == PACK_DOCUMENTS or size + one.size > PACK_BYTES:
            found.append([])
            size = 0
        found[-1].append(one)
        size += one.size
    return found


def vanished(listing: Listing, known: Mapping[str, KnownSource], wanted: Callable[[str], bool]) -> dict[str, str]:
    """Sources that were added from the listed folders and are not there now, each with its digest in the store."""
    gone: dict[str, str] = {}
    for label, root in listing.roots.items():
        for source in _below(label, root, known):
            unread = any(source.startswith(u) for u in listing.unread)  # a folder that is shut hides what is in it
            if source not in listing.found and not unread and wanted(source[len(label) + 1 :]):
                gone[source] = known[source].digest
    return gone


def why_not_remove(listing: Listing, known: Mapping[str, KnownSource], gone: Mapping[str, str]) -> str:
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


def _below(label: str, root: str, known: Mapping[str, KnownSource]) -> list[str]:
    return [s for s, facts in known.items() if s.startswith(f"{label}/") and facts.facts.get("root") == root]


def label_conflict(
    documents: Sequence[DocumentFile], known: Mapping[str, KnownSource], exists: Callable[[str], bool]
) -> str:
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
