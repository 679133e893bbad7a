"""The folder of a store: numbered files, published by a hard link that cannot overwrite, listed as one gapless chain.

CURRENT           the generation's name; a seal in its chain may already point further
g1/about.json     width, metric, embedder
g1/N.seg          commit N
g1/A-B.seg        commits A to B merged, with A-B.ivf and A-B.text/ beside it
g1/old/           what merging replaced: kept an hour, or as long as a pinned version needs it
g1/pins/N         version N is pinned
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
LISTINGS = 20  # with a gap, before it is believed
PUBLISHED: dict[Path, int] = {}  # by store: another number than before says that this process has published something
KEEP_S = 3600.0  # how long a replaced file stays, so that `at` reaches back
STAY_S = 60.0  # how long it stays in its place, so that a laggard's link to a number that was given still fails
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def name_of(span: Span) -> str:
    """The file of a commit or a merged run."""
    a, b = span
    return f"{a:010d}.seg" if a == b else f"{a:010d}-{b:010d}.seg"


def chain(spans: Iterable[Span], upto: int | None = None) -> list[Span]:
    """The fewest files that make up version `upto`, or the newest one that is whole.

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
    found: list[Span] = []
    while True:
        at = found[-1][1] + 1 if found else 1
        if longest.get(at):
            found.append((at, longest[at].pop()))
        elif upto is None or not found or found[-1][1] == upto:
            return found
        else:
            found.pop()  # a dead end: a shorter run was needed before


def whole(spans: Iterable[Span]) -> tuple[list[Span], list[Span]]:
    """The chain as far as there are files, and the numbers that are missing inside it.

    >>> whole([(1, 1), (4, 4), (5, 5)])
    ([(1, 1), (4, 4), (5, 5)], [(2, 3)])
    """
    spans = list(spans)
    found = chain(spans)
    missing: list[Span] = []
    while True:
        end = found[-1][1] if found else 0
        later = [s for s in spans if s[0] > end]
        if not later:
            return found, missing
        first = min(a for a, _ in later)
        missing.append((end + 1, first - 1))
        found += [(a + first - 1, b + first - 1) for a, b in chain([(a - first + 1, b - first + 1) for a, b in later])]


class Folder:
    """One generation's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.old, self.pinned, self.scratch = path / "old", path / "pins", path / "tmp"

    def file(self, span: Span) -> Path:
        """Where a commit or run lies, or would."""
        return self.path / name_of(span)

    def about(self) -> dict[str, Any] | None:
        """What the generation was made with; None before its first commit.

        Raises:
            StoreVersion: a newer agentmesh made it.
        """
        try:
            found: dict[str, Any] = json.loads((self.path / "about.json").read_bytes())
        except FileNotFoundError:
            return None
        if found["format"] > 1:
            raise StoreVersion(
                f"{self.path.parent} has format {found['format']} and this version of agentmesh reads 1",
                hint="upgrade agentmesh here",
                path=str(self.path.parent),
            )
        return found

    def spans(self, *, old: bool = False) -> dict[Span, Path]:
        """Every segment that is there; with `old` also those that were replaced."""
        found: dict[Span, Path] = {}
        for folder in (self.old, self.path) if old else (self.path,):
            with contextlib.suppress(FileNotFoundError):
                for entry in os.scandir(folder):
                    if match := NAME.fullmatch(entry.name):
                        a = int(match[1])
                        found[a, int(match[2] or a)] = Path(entry.path)
        return found

    def whole(self) -> tuple[list[Span], list[Span]]:
        """The chain of segments, and the numbers that are missing inside it.

        A listing is not one moment: while others commit it can show a file and miss an older one. A number is given only
        when the one before it is there, so that a gap that is none closes when one looks again.
        """
        found, missing = whole(self.spans())
        for _ in range(LISTINGS):
            if not missing:
                break
            time.sleep(0.005)
            found, missing = whole(self.spans())
        return found, missing

    def mtime_ns(self) -> int:
        """Changes when a file appears or goes; 0 for a folder that is not there."""
        try:
            return os.stat(self.path).st_mtime_ns
        except FileNotFoundError:
            return 0

    def make(self, about: dict[str, Any]) -> dict[str, Any]:
        """The generation's own description, ours unless somebody was first."""
        with writing(self.path.parent):
            self.scratch.mkdir(parents=True, exist_ok=True)
            temporary = self.write(json.dumps({"format": 1, **about}).encode())
            try:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, self.path / "about.json")
            finally:
                temporary.unlink()
            sync(self.path)
        found = self.about()
        assert found is not None
        return found

    def widen(self, d: int) -> None:
        """The width of a generation that began without vectors, unless somebody was first."""
        with self.alone(wait=True):
            found = self.about()
            if found and not found["d"]:
                self.write(json.dumps({**found, "d": d}).encode()).replace(self.path / "about.json")
                sync(self.path)

    def write(self, data: bytes) -> Path:
        """A new file with no name that counts, on the disk for good."""
        with self.temporary() as (path, file):
            file.write(data)
        return path

    @contextlib.contextmanager
    def temporary(self) -> Iterator[tuple[Path, BinaryIO]]:
        """The same for one that is written piece by piece; gone if that fails."""
        path = self.scratch / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            with open(path, "xb") as file:
                yield path, file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def publish(self, temporary: Path, span: Span) -> bool:
        """Gives a written file its number; False if somebody else has it."""
        try:
            os.link(temporary, self.file(span))
        except FileExistsError:
            return False
        PUBLISHED[self.path.parent] = PUBLISHED.get(self.path.parent, 0) + 1
        return True

    @contextlib.contextmanager
    def alone(self, wait: bool = False) -> Iterator[bool]:
        """The lock of those who merge: True while it is ours. A process that dies lets it go."""
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

    def retire(self, now_s: float | None = None, keep_s: float = KEEP_S) -> None:
        """Moves replaced files aside, and removes those that nothing needs any more. For the holder of the lock."""
        now = time.time() if now_s is None else now_s
        spans = self.spans()
        live = chain(spans)
        for span, path in spans.items():
            covered = any(a <= span[0] and span[1] <= b and (a, b) != span for a, b in live)
            if not covered:
                continue
            merged = max(self.file(other).stat().st_mtime for other in live if other[0] <= span[0] <= other[1])
            if now - merged >= STAY_S:
                self.old.mkdir(exist_ok=True)
                os.utime(path, (now, now))
                path.rename(self.old / path.name)
                _forget_beside(path)
        self._sweep_old(now, keep_s)
        self._sweep_left(now, keep_s, live)

    def _sweep_old(self, now: float, keep_s: float) -> None:
        spans = self.spans(old=True)
        needed = {span for pin in self.pins() for span in chain(spans, pin)}
        for span, path in spans.items():
            if path.parent == self.old and span not in needed and now - path.stat().st_mtime >= keep_s:
                path.unlink(missing_ok=True)

    def _sweep_left(self, now: float, keep_s: float, live: list[Span]) -> None:
        """What killed writers and compactors left behind."""
        stems = {self.file(span).stem for span in live}
        for entry in (*os.scandir(self.path), *os.scandir(self.scratch)):
            orphan = entry.name.endswith((".ivf", ".text")) and entry.name.split(".")[0] not in stems
            left = Path(entry.path).parent == self.scratch
            with contextlib.suppress(FileNotFoundError):  # a writer's own, which has its number by now
                if (left or orphan) and now - entry.stat().st_mtime >= keep_s:
                    if entry.is_dir():
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        Path(entry.path).unlink()


def _forget_beside(path: Path) -> None:
    path.with_suffix(".ivf").unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(".text"), ignore_errors=True)


def sync(folder: Path) -> None:
    """Puts a folder's names on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def current(path: Path) -> str:
    """The generation that a store's folder names."""
    try:
        return (path / "CURRENT").read_text().strip() or "g1"
    except FileNotFoundError:
        return "g1"


def set_current(path: Path, generation: str) -> None:
    """Names the generation, in one step."""
    temporary = path / f".CURRENT-{os.getpid()}"
    temporary.write_text(generation + "\n")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path / "CURRENT")
    sync(path)


def number_of(generation: str) -> int:
    """`g3` is 3; 0 for what is no generation."""
    return int(generation[1:]) if re.fullmatch(r"g\d+", generation) else 0


def drop_generations(path: Path, kept: str, keep_s: float = KEEP_S) -> None:
    """Removes generations before the current one, an hour after it took over."""
    if current(path) != kept:
        return
    for entry in os.scandir(path):
        old = 0 < number_of(entry.name) < number_of(kept)
        if old and time.time() - (path / "CURRENT").stat().st_mtime >= keep_s:
            shutil.rmtree(entry.path, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into a sentence.

    Raises:
        StoreFull · StoreError
    """
    try:
        yield
    except OSError as e:
        if e.errno in NO_ROOM:
            raise StoreFull(
                f"no room for a commit in {path} ({e.strerror})",
                hint="nothing of it was kept, make room and repeat it",
                path=str(path),
            ) from e
        raise StoreError(
            f"cannot write in {path}: {e.strerror or e}", hint="nothing of the commit was kept", path=str(path)
        ) from e
