"""What an ingest has to do: list the documents, compare them with the store, cut the changed ones into packs.

It reads the documents' folders and nothing else; the store's sources are given.
"""

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
    """A document on disk; `source` is its root's label and the path below the root, `size` is in bytes."""

    source: str
    path: str
    size: int
    mtime_ns: int
    root: str


@dataclass(slots=True)
class Listing:
    """The documents below the roots.

    Args:
        documents: by source, sorted.
        roots: label to folder.
        unreadable: what could not be listed, with the reason; a folder's name ends in `/`.
    """

    documents: dict[str, DocumentFile] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def matcher(glob: str) -> Callable[[str], bool]:
    """A function that says whether a relative path matches a pattern.

    `**/` matches any folders; `*` and `?` match within one name. A pattern without `/` matches names at any depth.

    >>> [matcher("guides/*.md")(path) for path in ("guides/a.md", "guides/x/a.md")]
    [True, False]
    """
    pattern = glob if "/" in glob else f"**/{glob}"
    regex = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./")):
        regex += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(piece, re.escape(piece))
    compiled = re.compile(regex)
    return lambda path: compiled.fullmatch(path) is not None


def list_documents(
    paths: Sequence[str], *, accepts: Callable[[str], bool], label: str = "", exclude: Iterable[str] = ()
) -> Listing:
    """List the documents of folders and files.

    Args:
        paths: absolute; a folder is walked, a file is listed whether `accepts` does or not.
        accepts: whether to list the file of a path relative to its root.
        label: what sources begin with; each root's own name when "".
        exclude: absolute folders that are not entered, such as the store's.
    """
    listing, excluded = Listing(), {os.path.realpath(p) for p in exclude}
    for path in paths:
        root = path if os.path.isdir(path) else os.path.dirname(path)
        name = label or os.path.basename(root) or "root"
        if root == path:
            listing.roots[name] = root
            entries: Iterable[tuple[str, str]] = _walk(root, "", accepts, excluded, listing, name)
        else:
            entries = [(os.path.basename(path), path)]
        for below, file in entries:
            _add_file(listing, f"{name}/{below}", file, root)
    listing.documents = dict(sorted(listing.documents.items()))
    return listing


def _walk(
    folder: str, below: str, accepts: Callable[[str], bool], excluded: set[str], listing: Listing, name: str
) -> Iterator[tuple[str, str]]:
    """(relative path, path) depth first; links to folders are not followed, links to files only below the root."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda e: e.name)
    except OSError as e:
        listing.unreadable[f"{name}/{below}"] = f"the folder cannot be listed ({e.strerror})"
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SKIPPED:
            continue
        path = f"{below}{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            if os.path.realpath(entry.path) not in excluded:
                yield from _walk(entry.path, f"{path}/", accepts, excluded, listing, name)
        elif accepts(path) and (not entry.is_symlink() or _links_below_root(entry.path, folder, below)):
            yield path, entry.path


def _links_below_root(link: str, folder: str, below: str) -> bool:
    root = Path(folder).resolve()
    for _ in range(below.count("/")):
        root = root.parent
    target = Path(link).resolve()
    return target.is_relative_to(root) and target.is_file()


def _add_file(listing: Listing, source: str, file: str, root: str) -> None:
    try:
        stat = os.stat(file)
    except OSError as e:
        listing.unreadable[source] = f"the file cannot be read ({e.strerror})"
        return
    if stat.st_size:  # an empty file has no text to index
        listing.documents[source] = DocumentFile(source, file, stat.st_size, stat.st_mtime_ns, root)


# ---- Comparing with the store -------------------------------------------------------------------

PACK_DOCUMENTS, PACK_BYTES = 64, 1 << 20
READ_BYTES = 1 << 20  # read at once to hash a file


class ChunkOptions(BaseModel):
    """How documents become chunks; other options index them again.

    Args:
        size: the most characters in a chunk.
        overlap: the most characters that a chunk shares with the one before.
        encoding: of text files without a byte order mark.
        metadata: of every chunk, as JSON; a datetime is `{"$date": …}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = 1000
    overlap: int = 150
    encoding: str = "utf-8"
    metadata: dict[str, Any] = {}

    def mark(self) -> str:
        """A digest of the options."""
        return digest(self.model_dump(mode="json"))


class IngestRequest(BaseModel):
    """What to ingest: the task of `Ingest`.

    Args:
        paths: absolute folders and files, as the workers see them.
        glob: which files of the folders; "" is every kind that a loader reads.
        label: what sources begin with; "" is each folder's own name.
        sync: remove the documents that vanished from the folders.
        force: also when a folder is empty, or more than half of its documents vanished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: list[str]
    glob: str = ""
    label: str = ""
    sync: bool = False
    force: bool = False


class Refusal(BaseModel):
    """Why an ingest is refused, and one thing to do."""

    message: str
    hint: str = ""


class PendingDocument(BaseModel):
    """A document to be read and indexed; `expects` is its digest in the store, "" for none."""

    source: str
    path: str
    root: str
    size: int
    mtime_ns: int
    expects: str = ""


class StoredSource(Protocol):
    """A source as the store has it."""

    @property
    def digest(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...


def content_digest(data: bytes, mark: str) -> str:
    """The digest of a document in the store: of its bytes, and of the options by which it is cut."""
    return f"{hashlib.blake2b(data, digest_size=16).hexdigest()}.{mark}"


def unchanged(file: DocumentFile, stored: StoredSource | None, mark: str) -> bool:
    """Whether the store has this version of a document: by size and time, and where the time differs by its bytes."""
    if stored is None or stored.facts.get("how") != mark:
        return False
    if (stored.facts.get("size"), stored.facts.get("mtime_ns")) == (file.size, file.mtime_ns):
        return True
    return stored.facts.get("size") == file.size and stored.digest == _file_digest(file.path, mark)


def _file_digest(path: str, mark: str) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                hasher.update(piece)
    except OSError:
        return ""  # the step that parses it reports the error
    return f"{hasher.hexdigest()}.{mark}"


def pending_documents(listing: Listing, stored: Mapping[str, StoredSource], mark: str) -> Iterator[PendingDocument]:
    """The new and changed documents; lazily, because a file may have to be read to decide."""
    for f in listing.documents.values():
        if not unchanged(f, stored.get(f.source), mark):
            yield PendingDocument(
                source=f.source, path=f.path, root=f.root, size=f.size, mtime_ns=f.mtime_ns,
                expects=stored[f.source].digest if f.source in stored else "",
            )  # fmt: skip


def split_into_packs(documents: Sequence[PendingDocument]) -> list[list[PendingDocument]]:
    """Packs of at most 64 documents or 1 MiB; a larger document is a pack of its own."""
    packs: list[list[PendingDocument]] = []
    size = PACK_BYTES
    for document in documents:
        if not packs or len(packs[-1]) == PACK_DOCUMENTS or size + document.size > PACK_BYTES:
            packs.append([])
            size = 0
        packs[-1].append(document)
        size += document.size
    return packs


def vanished_sources(
    listing: Listing, stored: Mapping[str, StoredSource], accepts: Callable[[str], bool]
) -> dict[str, str]:
    """The sources that were added from the listed folders and are not in them now, each with its digest in the store."""
    vanished: dict[str, str] = {}
    for label, root in listing.roots.items():
        for source in _from_root(label, root, stored):
            unreadable = any(source.startswith(u) for u in listing.unreadable)  # what is in such a folder is unknown
            if source not in listing.documents and not unreadable and accepts(source[len(label) + 1 :]):
                vanished[source] = stored[source].digest
    return vanished


def removal_refusal(
    listing: Listing, stored: Mapping[str, StoredSource], vanished: Mapping[str, str]
) -> Refusal | None:
    """Why these are not removed without `force`: a folder is empty, or more than half of its documents vanished."""
    for label, root in listing.roots.items():
        before = _from_root(label, root, stored)
        lost = [s for s in before if s in vanished]
        if lost and not any(s.startswith(f"{label}/") for s in listing.documents):
            return Refusal(
                message=f"nothing was removed: {root} has no documents now, and the store has {len(before)} from it",
                hint="check that the folder is mounted, or sync with force to remove them",
            )
        if 2 * len(lost) > len(before):
            return Refusal(
                message=f"nothing was removed: {len(lost)} of {len(before)} documents vanished from {root}",
                hint="sync with force to remove them",
            )
    return None


def _from_root(label: str, root: str, stored: Mapping[str, StoredSource]) -> list[str]:
    return [s for s, source in stored.items() if s.startswith(f"{label}/") and source.facts.get("root") == root]


def label_conflict(
    documents: Sequence[DocumentFile], stored: Mapping[str, StoredSource], exists: Callable[[str], bool]
) -> Refusal | None:
    """Why these sources are refused: another folder, which still exists, has the same label."""
    for document in documents:
        source = stored.get(document.source)
        root = str(source.facts.get("root", "")) if source is not None else ""
        if root and root != document.root and exists(root):
            return Refusal(
                message=f"{document.source!r} is in this store from {root}, not from {document.root}",
                hint="give this folder another label, such as label='mine'",
            )
    return None
