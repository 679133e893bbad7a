"""The documents below the roots of an ingest: each with its name in the store, its size and its time. Only lists."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SKIPPED = frozenset({"__pycache__", "node_modules"})  # and whatever begins with a dot


@dataclass(frozen=True, slots=True)
class Found:
    """A document as it lies on disk; `source` is its root's label and its path below it."""

    source: str
    path: str
    size: int
    mtime_ns: int
    root: str


@dataclass(slots=True)
class Listing:
    """What was found below the roots; `roots` has the label of each folder, `unread` what could not be listed, and why."""

    found: dict[str, Found] = field(default_factory=dict)
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
            _take(listing, f"{name}/{below}", file, root)
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


def _take(listing: Listing, source: str, file: str, root: str) -> None:
    try:
        stat = os.stat(file)
    except OSError as e:
        listing.unread[source] = f"the file cannot be read ({e.strerror})"
        return
    if stat.st_size:  # an empty file has nothing to find
        listing.found[source] = Found(source, file, stat.st_size, stat.st_mtime_ns, root)
