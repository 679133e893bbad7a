"""One process's hold on a store: what a follower knows, and the two ways to add to it, a commit and a merge."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from agentmesh.errors import EmbedderMismatch, StoreError
from agentmesh.rag import follow
from agentmesh.rag.compact import BuildText, merge_run, wants_merge
from agentmesh.rag.folder import Folder, Span, current, drop_generations, set_current, sync, writing
from agentmesh.rag.packing import Draft
from agentmesh.rag.segment import WHOLE_BYTES, Segment
from agentmesh.rag.state import Commit, State

log = logging.getLogger("agentmesh.rag")


class Core(follow.Follower):
    """A store that is also written. Writers of one process take turns."""

    build_text: BuildText | None = None  # what writes an index of words beside a merged file

    def commit(self, build: Callable[[State], Draft | Commit], *, d: int, key: str = "") -> Commit:
        """Publishes one commit under the next number.

        Args:
            build: from what is there to what is to be added; asked again when somebody else was quicker.
            d: width of its vectors, 0 when it has none.
            key: of the step that writes; the second commit with one key answers the first.
        """
        with self.lock:
            self._make(d)
            temporary: Path | None = None
            written, data = None, b""
            try:
                while True:
                    self.refresh()
                    state, folder = self._writable()
                    if key and (first := state.commit_of(key)):
                        return Commit(first.version, first.added, first.removed, True, first.refused)
                    draft = build(state)
                    if isinstance(draft, Commit):
                        return draft
                    if temporary is None or (draft.refused, draft.removed_ids) != written:
                        if temporary:
                            temporary.unlink(missing_ok=True)
                        data = draft.encode(self.about["d"], key)
                        with writing(self.path):
                            temporary = folder.write(data)
                        written = (draft.refused, draft.removed_ids)
                    span = (state.version + 1, state.version + 1)
                    if self._publish(temporary, span):
                        break
            finally:
                if temporary:
                    temporary.unlink(missing_ok=True)
            self._confirm(folder, span)
            done = self._take_in(state, span, data)
            if wants_merge(state.segments):
                self.merge(light=True)
            return done

    def _confirm(self, folder: Folder, span: Span) -> None:
        try:
            sync(folder.path)
        except OSError as e:
            raise StoreError(
                f"commit {span[0]} of {self.path} is there, but the disk has not confirmed it ({e.strerror}); "
                "repeat it with the same key",
                path=str(self.path),
            ) from e

    def _make(self, d: int) -> None:
        if self.folder is None and not self._find_generation():
            if not d:
                d = self._identity.d if self._identity else 0
            identity = self._identity.to_json() if self._identity else None
            about = {"d": d, "metric": self.metric, "identity": identity}
            with writing(self.path):
                name = current(self.path)
                Folder(self.path / name).make(about)
                if not (self.path / "CURRENT").exists():
                    set_current(self.path, name)
            self._find_generation()
        if d and not self.about["d"]:
            with writing(self.path):
                self._writable_folder().widen(d)
            self._find_generation()
        if d and d != self.about["d"]:
            raise EmbedderMismatch(
                f"{self.path} holds vectors of width {self.about['d']} and was given some of width {d}; "
                "use the embedder it was filled by, or `agentmesh rag reembed`",
                path=str(self.path),
            )

    def _publish(self, temporary: Path, span: Span) -> bool:
        assert self.folder is not None
        with writing(self.path):
            if not self.folder.publish(temporary, span):
                return False
        if time.monotonic() - self._checked < follow.FRESH_S:
            return True
        # long asleep between the listing and the link: the number may have been given, merged and cleaned away
        if any(a <= span[0] <= b and (a, b) != span for a, b in self.folder.spans()):
            self.folder.file(span).unlink(missing_ok=True)
            self._checked = float("-inf")
            return False
        return True

    def _take_in(self, state: State, span: Span, data: bytes) -> Commit:
        assert self.folder is not None
        path = self.folder.file(span)
        # a large one is mapped, as its readers do
        segment = Segment.parse(path, *span, data) if len(data) <= WHOLE_BYTES else Segment.open(path, *span)
        done = state.apply(segment)
        self._opened[span] = segment
        self._chain.append(span)
        self._view = state.view()
        return done

    def merge(self, *, everything: bool = False, light: bool = False) -> Span | None:
        """Merges the end of the chain, unless somebody else is at it; None when nothing was merged.

        Raises:
            StoreDamaged: a file cannot be trusted; nothing was changed. A writer that merges by the way only says so.
        """
        with self.lock:
            self.refresh()
            if self.folder is None:
                return None
            folder = self.folder
        try:
            with writing(self.path), folder.alone() as mine:
                if not mine:
                    return None
                folder.retire()
                drop_generations(self.path, folder.path.name)
                span = merge_run(
                    folder, self.about["d"], self.metric, everything=everything, light=light, build_text=self.build_text
                )
        except StoreError as e:
            if not light:
                raise
            log.warning("%s; the commits of %s were not merged", e, self.path)
            return None
        with self.lock:
            self._listed = float("-inf")
            self.refresh()
        return span
