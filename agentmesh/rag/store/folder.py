"""The folder of a store: numbered files, published by a hard link that cannot overwrite, listed as one gapless chain.

```
CURRENT           the generation's name; a seal at the end of its chain may name a newer one
g1/about.json     the generation's settings: format, width, metric, embedder
g1/N.seg          the segment of commit N
g1/A-B.seg        the segment of commits A to B, merged; A-B.ivf and A-B.text/ are its indexes
g1/old/           segments that merging replaced: kept an hour, or as long as a pinned version needs them
g1/pins/N         version N is pinned
g1/tmp/           files that are not published yet
g1/lock           held by the process that merges
```
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from agentmesh.errors import StoreError, StoreFull, StoreVersion

Span = tuple[int, int]
NAME = re.compile(r"(\d{10})(?:-(\d{10}))?\.seg")
GAP_LISTINGS = 20  # listings with a gap before the gap is taken for a missing file
GAP_RELIST_S = 0.005
PUBLISH_COUNTS: dict[Path, int] = {}  # by store: how many segments this process has published
RETENTION_S = 3600.0  # how long a replaced segment is kept, so that `at` reads older versions
RETIRE_AFTER_S = 60.0  # how long it keeps its name: a slow writer's link to a number already used must fail
FULL_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def name_of(span: Span) -> str:
    """The file name of a segment: one commit, or commits a to b merged."""
    a, b = span
    return f"{a:010d}.seg" if a == b else f"{a:010d}-{b:010d}.seg"


def chain(spans: Iterable[Span], upto: int | None = None) -> list[Span]:
    """The fewest segments that make up version `upto`, or the newest version without a gap before it.

    >>> chain([(1, 1), (2, 2), (3, 3), (1, 2)])
    [(1, 2), (3, 3)]
    >>> chain([(1, 1), (2, 2), (3, 3), (1, 2)], 1)
    [(1, 1)]
    """
    longest: dict[int, list[int]] = {}
    for a, b in spans:
        if upto is None or b <= upto:
            longest.setdefault(a, []).append(b)
    for ends in longest.values():
        ends.sort()
    links: list[Span] = []
    while True:
        first = links[-1][1] + 1 if links else 1
        if longest.get(first):
            links.append((first, longest[first].pop()))
        elif upto is None or not links or links[-1][1] == upto:
            return links
        else:
            links.pop()  # a dead end: a shorter segment was needed before


def chain_and_gaps(spans: Iterable[Span]) -> tuple[list[Span], list[Span]]:
    """The chain to the newest segment, and the numbers that are missing inside it.

    >>> chain_and_gaps([(1, 1), (4, 4), (5, 5)])
    ([(1, 1), (4, 4), (5, 5)], [(2, 3)])
    """
    spans = list(spans)
    links = chain(spans)
    gaps: list[Span] = []
    while True:
        end = links[-1][1] if links else 0
        later = [s for s in spans if s[0] > end]
        if not later:
            return links, gaps
        first = min(a for a, _ in later)
        gaps.append((end + 1, first - 1))
        links += [(a + first - 1, b + first - 1) for a, b in chain([(a - first + 1, b - first + 1) for a, b in later])]


class Folder:
    """One generation's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replaced, self.pinned, self.temporaries = path / "old", path / "pins", path / "tmp"

    def file(self, span: Span) -> Path:
        """The path of a segment, whether it exists or not."""
        return self.path / name_of(span)

    def settings(self) -> dict[str, Any] | None:
        """The generation's format, width (`d`), metric and embedder (`identity`); None before its first commit.

        Raises:
            StoreVersion: a newer agentmesh made it.
        """
        try:
            settings: dict[str, Any] = json.loads((self.path / "about.json").read_bytes())
        except FileNotFoundError:
            return None
        if settings["format"] > 1:
            raise StoreVersion(
                f"{self.path.parent} has format {settings['format']} and this version of agentmesh reads 1",
                hint="upgrade agentmesh here",
                path=str(self.path.parent),
            )
        return settings

    def spans(self, *, replaced: bool = False) -> dict[Span, Path]:
        """Every segment with its path; with `replaced` also those that merging replaced."""
        paths: dict[Span, Path] = {}
        for folder in (self.replaced, self.path) if replaced else (self.path,):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(folder):
                    if match := NAME.fullmatch(entry.name):
                        a = int(match[1])
                        paths[a, int(match[2] or a)] = Path(entry.path)
        return paths

    def chain_and_gaps(self) -> tuple[list[Span], list[Span]]:
        """The chain of segments, and the numbers that are missing inside it.

        A directory listing is not atomic: while others commit, it can show a file and miss an older one. A commit takes
        a number only when the number before it exists, so such a gap closes in a later listing.
        """
        links, gaps = chain_and_gaps(self.spans())
        for _ in range(GAP_LISTINGS):
            if not gaps:
                break
            time.sleep(GAP_RELIST_S)
            links, gaps = chain_and_gaps(self.spans())
        return links, gaps

    def mtime_ns(self) -> int:
        """Changes when a file is added or removed; 0 for a folder that does not exist."""
        try:
            return os.stat(self.path).st_mtime_ns
        except FileNotFoundError:
            return 0

    def create(self, settings: dict[str, Any]) -> None:
        """Create the generation with these settings, unless another process was first."""
        with disk_errors(self.path.parent):
            self.temporaries.mkdir(parents=True, exist_ok=True)
            temporary = self.write(json.dumps({"format": 1, **settings}).encode())
            try:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, self.path / "about.json")
            finally:
                temporary.unlink()
            sync(self.path)

    def set_width(self, d: int) -> None:
        """Set the width of a generation that began without vectors, unless another process was first."""
        with self.merge_lock(wait=True):
            settings = self.settings()
            if settings and not settings["d"]:
                self.write(json.dumps({**settings, "d": d}).encode()).replace(self.path / "about.json")
                sync(self.path)

    def write(self, data: bytes) -> Path:
        """Write a file that is not published yet, and fsync it."""
        with self.temporary() as (path, file):
            file.write(data)
        return path

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """`write` for a file that is written in pieces; it is fsynced at the end, and removed if that fails."""
        path = self.temporaries / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            with open(path, "xb") as file:
                yield path, file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def publish(self, temporary: Path, span: Span) -> bool:
        """Link a written file under its number; False if the number is taken."""
        try:
            os.link(temporary, self.file(span))
        except FileExistsError:
            return False
        PUBLISH_COUNTS[self.path.parent] = PUBLISH_COUNTS.get(self.path.parent, 0) + 1
        return True

    @contextlib.contextmanager
    def merge_lock(self, wait: bool = False) -> Iterator[bool]:
        """Take the lock for merging: yields whether it was acquired. The lock is released when its process dies."""
        with open(self.path / "lock", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def pins(self) -> set[int]:
        """The pinned versions."""
        with contextlib.suppress(FileNotFoundError):
            return {int(name) for name in os.listdir(self.pinned) if name.isdigit()}
        return set()

    def retire(self, now_s: float | None = None, keep_s: float = RETENTION_S) -> None:
        """Move replaced segments aside, and remove those that no version needs; the caller holds `merge_lock`."""
        now = time.time() if now_s is None else now_s
        spans = self.spans()
        live = chain(spans)
        for span, path in spans.items():
            covered = any(a <= span[0] and span[1] <= b and (a, b) != span for a, b in live)
            if not covered:
                continue
            merged = max(self.file(other).stat().st_mtime for other in live if other[0] <= span[0] <= other[1])
            if now - merged >= RETIRE_AFTER_S:
                self.replaced.mkdir(exist_ok=True)
                os.utime(path, (now, now))
                path.rename(self.replaced / path.name)
                _remove_indexes(path)
        self._remove_replaced(now, keep_s)
        self._remove_orphans(now, keep_s, live)

    def _remove_replaced(self, now: float, keep_s: float) -> None:
        spans = self.spans(replaced=True)
        needed = {span for pin in self.pins() for span in chain(spans, pin)}
        for span, path in spans.items():
            if path.parent == self.replaced and span not in needed and now - path.stat().st_mtime >= keep_s:
                path.unlink(missing_ok=True)

    def _remove_orphans(self, now: float, keep_s: float, live: list[Span]) -> None:
        """Remove what killed writers and compactors left behind."""
        stems = {self.file(span).stem for span in live}
        for entry in (*os.scandir(self.path), *os.scandir(self.temporaries)):
            orphaned_index = entry.name.endswith((".ivf", ".text")) and entry.name.split(".")[0] not in stems
            temporary = Path(entry.path).parent == self.temporaries
            with contextlib.suppress(FileNotFoundError):  # a running writer's file, which it has published and removed
                if (temporary or orphaned_index) and now - entry.stat().st_mtime >= keep_s:
                    if entry.is_dir():
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        Path(entry.path).unlink()


def _remove_indexes(path: Path) -> None:
    path.with_suffix(".ivf").unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(".text"), ignore_errors=True)


def sync(folder: Path) -> None:
    """Fsync a folder, so that the names in it survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def current(path: Path) -> str:
    """The name of the store's current generation."""
    try:
        return (path / "CURRENT").read_text().strip() or "g1"
    except FileNotFoundError:
        return "g1"


def set_current(path: Path, generation: str) -> None:
    """Make a generation the current one, atomically."""
    temporary = path / f".CURRENT-{os.getpid()}"
    temporary.write_text(generation + "\n")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path / "CURRENT")
    sync(path)


def number_of(generation: str) -> int:
    """`g3` is 3; 0 for a name that is not a generation's."""
    return int(generation[1:]) if re.fullmatch(r"g\d+", generation) else 0


def drop_generations(path: Path, generation: str, keep_s: float = RETENTION_S) -> None:
    """Remove the generations before this one, `keep_s` after it became the current one."""
    if current(path) != generation:
        return
    for entry in os.scandir(path):
        older = 0 < number_of(entry.name) < number_of(generation)
        if older and time.time() - (path / "CURRENT").stat().st_mtime >= keep_s:
            shutil.rmtree(entry.path, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a StoreError in place of an OSError.

    Raises:
        StoreFull: the disk or the quota is full.
        StoreError: anything else that the disk refuses.
    """
    try:
        yield
    except OSError as e:
        if e.errno in FULL_DISK_ERRNOS:
            raise StoreFull(
                f"nothing was committed: no room in {path} ({e.strerror})",
                hint="make room and repeat the commit",
                path=str(path),
            ) from e
        raise StoreError(
            f"nothing was committed: cannot write in {path} ({e.strerror or e})",
            hint="check the folder's permissions and the disk",
            path=str(path),
        ) from e
