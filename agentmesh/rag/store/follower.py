"""One process's view of a store: follows what other processes commit, merge and re-embed. Opening it does no I/O."""

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from agentmesh.errors import EmbedderMismatch, StoreDamaged, StoreError, StoreVersion
from agentmesh.rag.embedders.base import Identity
from agentmesh.rag.store.folder import PUBLISH_COUNTS, Folder, Span, chain, current, name_of
from agentmesh.rag.store.memtable import Memtable
from agentmesh.rag.store.segment import Segment
from agentmesh.rag.store.snapshot import Snapshot, SnapshotPart
from agentmesh.rag.store.state import State

POLL_S = 0.02  # a search looks for commits of other processes at most this often
LOCK_WAIT_S = 0.05  # how long a search waits for another thread's refresh before it reads the snapshot it has
MERGE_POLL_S = 1.0  # the folder is listed at most this often, to find merges; commits are found by their number
RELIST_AFTER_S = 30.0  # after a longer pause the next number may have been merged and removed (folder.RETIRE_AFTER_S)
REFRESH_ATTEMPTS = 20
METRICS = ("cosine", "l2")

log = logging.getLogger("agentmesh.rag")


class Follower:
    """The store's files as this process knows them. A search does not wait for a commit of another thread."""

    def __init__(self, path: Path, metric: str | None, identity: Identity | None) -> None:
        if metric is not None and metric not in METRICS:
            raise StoreError(f"unknown metric {metric!r}", hint='use "cosine" or "l2"')
        self.path, self._metric, self._identity = path, metric, identity
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self.lock = threading.RLock()
        self.folder: Folder | None = None
        self.settings: dict[str, Any] = {}
        self.state: State | None = None
        self._chain: list[Span] = []
        self._opened: dict[Span, Segment] = {}
        self._snapshot = EMPTY
        self._mtime_ns = -1
        self._published = 0
        self._embedder_unchecked = False  # of a generation that a seal led to
        self._refreshed = self._listed = float("-inf")

    @property
    def metric(self) -> str:
        """The store's metric, or the expected one while the store is empty."""
        return str(self.settings.get("metric") or self._metric or "cosine")

    @property
    def identity(self) -> Identity | None:
        """The embedder of the store's vectors; None for an empty store, or when its writer named none."""
        return Identity.from_json(data) if (data := self.settings.get("identity")) else None

    def expect(self, identity: Identity | None) -> None:
        """Expect from now on that the store's vectors come from this embedder."""
        with self.lock:
            self._identity = identity
            self.refresh()

    def latest(self) -> Snapshot:
        """The newest snapshot: with all commits of this process, and with others' commits older than `POLL_S`."""
        if self._pid != os.getpid():
            self._reset()  # a forked child must not use its parent's state, least of all a lock that a thread holds
        is_open = self._snapshot is not EMPTY
        published = PUBLISH_COUNTS.get(self.path, 0)
        if is_open and published == self._published and time.monotonic() - self._refreshed < POLL_S:
            return self._snapshot
        # the thread that holds the lock is reading the same files, but may have begun before this process's last commit
        wait_s = -1 if not is_open else LOCK_WAIT_S if published != self._published else 0
        if self.lock.acquire(timeout=wait_s):
            try:
                self.refresh()
                self._published = published
            finally:
                self.lock.release()
        return self._snapshot

    def refresh(self) -> None:
        """Apply what was committed since the last refresh; the caller holds the lock."""
        if self._pid != os.getpid():
            self._reset()
        for _ in range(REFRESH_ATTEMPTS):
            if self.folder is None and not self._find_generation():
                return
            assert self.folder is not None
            now = time.monotonic()
            try:
                if now - self._refreshed > RELIST_AFTER_S and not self.folder.mtime_ns():
                    self.folder = None  # another generation replaced it long ago
                    continue
                if self.state is None or now - self._refreshed > RELIST_AFTER_S:
                    self._list()
                else:
                    self._probe()
                    if now - self._listed > MERGE_POLL_S and self._mtime_ns != self._open_folder().mtime_ns():
                        self._list()
            except BaseException as e:
                self.state = None  # a segment may be half applied: the next refresh starts from the first
                if isinstance(e, FileNotFoundError):
                    continue  # merged and removed between listing and reading
                raise
            if not self._follow_seal():
                if self._embedder_unchecked:  # only of the last generation: the store may have gone to another and back
                    self._check(self.settings)
                    self._embedder_unchecked = False
                self._refreshed = now
                return
        raise StoreError(
            f"the files of {self.path} change faster than they can be read",
            hint="try again while fewer processes write",
            path=str(self.path),
        )

    def _find_generation(self, name: str | None = None) -> bool:
        folder = Folder(self.path / (name or current(self.path)))
        settings = folder.settings()
        if settings is None:
            return False
        if name is None:
            self._check(settings)
        self._embedder_unchecked = name is not None
        self.folder, self.settings, self.state = folder, settings, None
        self._chain, self._opened, self._mtime_ns = [], {}, -1
        return True

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise an error when the store has another metric or embedder than expected."""
        if self._metric not in (None, settings["metric"]):
            raise StoreError(
                f"{self.path} holds vectors for {settings['metric']!r}, not for {self._metric!r}",
                hint="open it without a metric",
            )
        if self._identity is None:
            return
        if self._identity.d and self._identity.d != settings["d"]:
            raise EmbedderMismatch(
                f"{self.path} holds vectors of width {settings['d']} and {self._identity.name!r} makes {self._identity.d}",
                hint="use the embedder it was filled by, or `agentmesh rag reembed`",
                path=str(self.path),
            )
        if settings.get("identity"):
            Identity.from_json(settings["identity"]).check(self._identity)

    def _probe(self) -> None:
        """Apply the commits that follow the newest known one, each found by its number."""
        state, folder = self._open_state(), self._open_folder()
        before = state.version
        while True:
            span = (state.version + 1, state.version + 1)
            if not os.path.exists(folder.file(span)):
                break
            self._apply(state, span, [])
            self._chain.append(span)
        if state.version > before:
            self._snapshot = state.snapshot()

    def _list(self) -> None:
        """List the folder and apply what is new in the chain; start from the first segment where some were merged."""
        folder = self._open_folder()
        listed, mtime_ns = time.monotonic(), folder.mtime_ns()
        links, gaps = folder.chain_and_gaps()
        if self.state is None or links[: len(self._chain)] != self._chain:
            self.state, self._chain = State(self.settings["d"]), []
        state = self.state
        for span in links[len(self._chain) :]:
            self._apply(state, span, gaps)
            self._chain.append(span)
        in_chain = set(self._chain)
        self._opened = {span: segment for span, segment in self._opened.items() if span in in_chain}
        self._snapshot = state.snapshot()
        self._mtime_ns, self._listed = mtime_ns, listed

    def _apply(self, state: State, span: Span, gaps: list[Span]) -> None:
        for gap in gaps:
            if gap[1] == span[0] - 1:
                self._skip(state, gap, f"{name_of(gap)} of {self.path} is missing")
        try:
            if span not in self._opened:
                self._opened[span] = Segment.open(self._open_folder().file(span), *span)
            if self._opened[span].d != state.d and self._opened[span].n:
                self._find_generation()  # the generation has got its first vectors, and with them its width
                raise FileNotFoundError
            state.apply(self._opened[span])
        except StoreDamaged as e:
            self._skip(state, span, str(e))

    def _skip(self, state: State, span: Span, problem: str) -> None:
        state.skip(span[1], name_of(span), problem)
        log.warning("%s; the rest of %s is searched without it", problem, self.path)

    def _follow_seal(self) -> bool:
        """Go to the next generation where this one is sealed; whether it is."""
        last = self.state.segments[-1] if self.state and self.state.segments else None
        if last is None or last.kind != "seal":
            return False
        if not self._find_generation(last.header["next"]):
            raise StoreDamaged(
                f"{self.path} was sealed for generation {last.header['next']}, which is missing", path=str(self.path)
            )
        return True

    def _open_folder(self) -> Folder:
        assert self.folder is not None
        return self.folder

    def _open_state(self) -> State:
        assert self.state is not None
        return self.state

    def at_version(self, version: int) -> tuple[State, Snapshot]:
        """The store at an older version.

        Raises:
            StoreVersion: its files were removed, or it does not exist yet.
        """
        with self.lock:
            self.refresh()
            if self.folder is None or self.state is None or version > self.state.version:
                raise StoreVersion(f"{self.path} has no version {version} yet", path=str(self.path))
            spans = self.folder.spans(replaced=True)
            if not (links := chain(spans, version)):
                oldest = next(b for b in sorted({b for _, b in spans}) if chain(spans, b))
                raise StoreVersion(
                    f"the files of version {version} of {self.path} were removed",
                    hint=f"read version {oldest}, the oldest, or a newer one; pin() keeps a version",
                    path=str(self.path),
                )
            state = State(self.settings["d"])
            for span in links:
                state.apply(Segment.open(spans[span], *span))
            return state, state.snapshot()


EMPTY = Snapshot(0, (), SnapshotPart(Memtable(1), np.zeros(0, bool), np.zeros((0, 1), np.float32)))
