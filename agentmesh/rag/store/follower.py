"""One process's eyes on a store: follows what others commit, merge and move. Opening it does no I/O."""

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from agentmesh.errors import EmbedderMismatch, StoreDamaged, StoreError, StoreVersion
from agentmesh.rag.embedders.base import Identity
from agentmesh.rag.store.folder import PUBLISHED, Folder, Span, chain, current, name_of
from agentmesh.rag.store.memtable import Memtable
from agentmesh.rag.store.segment import Segment
from agentmesh.rag.store.snapshot import Snapshot, SnapshotPart
from agentmesh.rag.store.state import State

POLL_S = 0.02  # a search looks for others' commits at most this often
MOMENT_S = 0.05
LIST_S = 1.0  # merges are looked for at most this often; commits are asked for by their number
FRESH_S = 30.0  # longer asleep than this, a number may have been given, merged and cleaned away (folder.STAY_S)
TRIES = 20
METRICS = ("cosine", "l2")

log = logging.getLogger("agentmesh.rag")


class Follower:
    """The store's files as this process knows them. Searches do not wait for whoever writes."""

    def __init__(self, path: Path, metric: str | None, identity: Identity | None) -> None:
        if metric is not None and metric not in METRICS:
            raise StoreError(f'a store\'s metric is "cosine" or "l2", not {metric!r}')
        self.path, self._asked, self._identity = path, metric, identity
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self.lock = threading.RLock()
        self.folder: Folder | None = None
        self.about: dict[str, Any] = {}
        self.state: State | None = None
        self._chain: list[Span] = []
        self._opened: dict[Span, Segment] = {}
        self._view = EMPTY
        self._mtime_ns = -1
        self._published = 0
        self._unchecked = False  # its embedder, of a generation that a seal led to
        self._checked = self._listed = float("-inf")

    @property
    def metric(self) -> str:
        """The store's own, or the one asked for while it is empty."""
        return str(self.about.get("metric") or self._asked or "cosine")

    @property
    def identity(self) -> Identity | None:
        """The embedder that the store was filled by."""
        return Identity.from_json(found) if (found := self.about.get("identity")) else None

    def expect(self, identity: Identity | None) -> None:
        """From now on the store's vectors come from this embedder."""
        with self.lock:
            self._identity = identity
            self.refresh()

    def latest(self) -> Snapshot:
        """What a search sees now: other processes' commits of at least `POLL_S` ago, and all of this one's."""
        if self._pid != os.getpid():
            self._reset()  # a forked child shares nothing with its parent, least of all a lock that is held
        known = self._view is not EMPTY
        published = PUBLISHED.get(self.path, 0)
        if known and published == self._published and time.monotonic() - self._checked < POLL_S:
            return self._view
        # whoever holds it is reading the same files, but may have begun before this process's last commit
        wait_s = -1 if not known else MOMENT_S if published != self._published else 0
        if self.lock.acquire(timeout=wait_s):
            try:
                self.refresh()
                self._published = published
            finally:
                self.lock.release()
        return self._view

    def refresh(self) -> None:
        """Takes in what was committed; the caller holds the lock."""
        if self._pid != os.getpid():
            self._reset()
        for _ in range(TRIES):
            if self.folder is None and not self._find_generation():
                return
            assert self.folder is not None
            now = time.monotonic()
            try:
                if now - self._checked > FRESH_S and not self.folder.mtime_ns():
                    self.folder = None  # another generation took its place, long ago
                    continue
                if self.state is None or now - self._checked > FRESH_S:
                    self._list()
                else:
                    self._probe()
                    if now - self._listed > LIST_S and self._mtime_ns != self._writable()[1].mtime_ns():
                        self._list()
            except BaseException as e:
                self.state = None  # half applied: the next look begins anew
                if isinstance(e, FileNotFoundError):
                    continue  # merged away between the listing and the reading
                raise
            if not self._sealed():
                if self._unchecked:  # only of the last one on the way: it may have gone there and back
                    self._check(self.about)
                    self._unchecked = False
                self._checked = now
                return
        raise StoreError(f"the files of {self.path} change faster than they can be read", path=str(self.path))

    def _find_generation(self, name: str | None = None) -> bool:
        folder = Folder(self.path / (name or current(self.path)))
        about = folder.about()
        if about is None:
            return False
        if name is None:
            self._check(about)
        self._unchecked = name is not None
        self.folder, self.about, self.state = folder, about, None
        self._chain, self._opened, self._mtime_ns = [], {}, -1
        return True

    def _check(self, about: dict[str, Any]) -> None:
        if self._asked not in (None, about["metric"]):
            raise StoreError(
                f"{self.path} holds vectors for {about['metric']!r}, not for {self._asked!r}",
                hint="open it without a metric",
            )
        if self._identity is None:
            return
        if self._identity.d and self._identity.d != about["d"]:
            raise EmbedderMismatch(
                f"{self.path} holds vectors of width {about['d']} and {self._identity.name!r} makes {self._identity.d}",
                hint="use the embedder it was filled by, or `agentmesh rag reembed`",
                path=str(self.path),
            )
        if about.get("identity"):
            Identity.from_json(about["identity"]).check(self._identity)

    def _probe(self) -> None:
        """The commits that follow the one we know, each by its number."""
        state, folder = self._writable()
        before = state.version
        while True:
            span = (state.version + 1, state.version + 1)
            if not os.path.exists(folder.file(span)):
                break
            self._apply(state, span, [])
            self._chain.append(span)
        if state.version > before:
            self._view = state.view()

    def _list(self) -> None:
        """The whole folder: what is there is taken over where it was merged."""
        assert self.folder is not None
        listed, mtime_ns = time.monotonic(), self.folder.mtime_ns()
        found, missing = self.folder.whole()
        if self.state is None or found[: len(self._chain)] != self._chain:
            self.state, self._chain = State(self.about["d"]), []
        state = self.state
        for span in found[len(self._chain) :]:
            self._apply(state, span, missing)
            self._chain.append(span)
        kept = set(self._chain)
        self._opened = {span: segment for span, segment in self._opened.items() if span in kept}
        self._view = state.view()
        self._mtime_ns, self._listed = mtime_ns, listed

    def _apply(self, state: State, span: Span, missing: list[Span]) -> None:
        assert self.folder is not None
        for gap in missing:
            if gap[1] == span[0] - 1:
                self._warn(state, gap, f"{name_of(gap)} of {self.path} is missing")
        try:
            if span not in self._opened:
                self._opened[span] = Segment.open(self.folder.file(span), *span)
            if self._opened[span].d != state.d and self._opened[span].n:
                self._find_generation()  # its first vectors have come, and with them its width
                raise FileNotFoundError
            state.apply(self._opened[span])
        except StoreDamaged as e:
            self._warn(state, span, str(e))

    def _warn(self, state: State, span: Span, problem: str) -> None:
        state.skip(span[1], name_of(span), problem)
        log.warning("%s; the rest of %s is searched without it", problem, self.path)

    def _sealed(self) -> bool:
        last = self.state.segments[-1] if self.state and self.state.segments else None
        if last is None or last.kind != "seal":
            return False
        if not self._find_generation(last.header["next"]):
            raise StoreDamaged(f"{self.path} was moved to generation {last.header['next']}, which is not there")
        return True

    def _writable_folder(self) -> Folder:
        assert self.folder is not None
        return self.folder

    def _writable(self) -> tuple[State, Folder]:
        assert self.state is not None
        return self.state, self._writable_folder()

    def past(self, version: int) -> tuple[State, Snapshot]:
        """The store as it was.

        Raises:
            StoreVersion: its files are gone, or it has not been yet.
        """
        with self.lock:
            self.refresh()
            if self.folder is None or self.state is None or version > self.state.version:
                raise StoreVersion(f"{self.path} has no version {version} yet", path=str(self.path))
            spans = self.folder.spans(old=True)
            if not (found := chain(spans, version)):
                oldest = next(b for b in sorted({b for _, b in spans}) if chain(spans, b))
                raise StoreVersion(
                    f"version {version} of {self.path} is not kept any more",
                    hint=f"the oldest is {oldest}, and pin() keeps one",
                    path=str(self.path),
                )
            state = State(self.about["d"])
            for span in found:
                state.apply(Segment.open(spans[span], *span))
            return state, state.view()


EMPTY = Snapshot(0, (), SnapshotPart(Memtable(1), np.zeros(0, bool), np.zeros((0, 1), np.float32)))
