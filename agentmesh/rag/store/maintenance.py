"""What a store's keeper asks: is everything as it was written, what is there, and which versions are to stay."""

from dataclasses import dataclass, field

from agentmesh.errors import StoreDamaged, StoreError, StoreVersion
from agentmesh.rag.store.compaction import GROWTH
from agentmesh.rag.store.folder import name_of, sync, writing
from agentmesh.rag.store.segment import Segment
from agentmesh.rag.store.snapshot import Snapshot
from agentmesh.rag.store.writer import StoreWriter

COMPACT_FROM_BLOCKS = 4  # more files than this are worth a compaction


@dataclass(frozen=True, slots=True)
class Stats:
    """What is in a store, and what searching it costs."""

    version: int = 0
    generation: str = "g1"
    chunks: int = 0
    sources: int = 0
    pending: int = 0  # sources of which parts are missing
    d: int = 0
    metric: str = "cosine"
    embedder: str = ""
    files: int = 0
    bytes: int = 0
    dead: int = 0  # rows that were replaced or removed and still take room
    in_memory: int = 0  # rows of the newest commits
    indexes: dict[str, int] = field(default_factory=dict)  # of large files: lists a search looks into
    pins: tuple[int, ...] = ()
    damaged: tuple[str, ...] = ()
    wants_compaction: bool = False


def stats(core: StoreWriter) -> Stats:
    """A store in numbers."""
    with core.lock:
        core.refresh()
        state, folder = core.state, core.folder
        if state is None or folder is None:
            return Stats(metric=core.metric)
        view = state.view()
        rows = sum(p.n for p in view.parts)
        seen = view.count()
        sizes = [s.path.stat().st_size for s in state.segments if s.path.exists()]
        blocks = len(state.blocks)
        return Stats(
            version=state.version, generation=folder.path.name, chunks=seen, sources=len(state.sources()),
            pending=len(state.pending), d=state.d, metric=core.metric,
            embedder=core.identity.name if core.identity else "", files=len(sizes), bytes=sum(sizes), dead=rows - seen,
            in_memory=view.delta.n, indexes=_indexes(view),
            pins=tuple(sorted(folder.pins())), damaged=tuple(sorted(state.damaged)),
            wants_compaction=blocks > COMPACT_FROM_BLOCKS or rows - seen > max(1000, seen // GROWTH),
        )  # fmt: skip


def _indexes(view: Snapshot) -> dict[str, int]:
    found = [(p.rows, p.index) for p in view.blocks]
    return {rows.path.name: index.nprobe for rows, index in found if isinstance(rows, Segment) and index}


def verify(core: StoreWriter) -> list[str]:
    """What is wrong with the files, one sentence each; reads all of them. Nothing: an empty list."""
    with core.lock:
        core.refresh()
        folder = core.folder
    if folder is None:
        return []
    found, missing = folder.whole()
    problems = [f"{name_of(gap)} of {folder.path} is missing" for gap in missing]
    for span in found:
        try:
            problems += list(Segment.open(folder.file(span), *span).problems())
        except StoreDamaged as e:
            problems.append(str(e))
        except FileNotFoundError:  # merged away since it was listed
            continue
    return problems


def pin(core: StoreWriter) -> int:
    """Keeps the newest version for `at`, until it is unpinned.

    Raises:
        StoreError: the store is empty, or cannot be written.
    """
    with core.lock:
        core.refresh()
        if core.state is None or core.folder is None or not core.state.version:
            raise StoreError(f"{core.path} is empty", hint="there is no version to pin", path=str(core.path))
        version, folder = core.state.version, core.folder
    with writing(core.path):
        folder.pinned.mkdir(exist_ok=True)
        (folder.pinned / str(version)).touch()
        sync(folder.pinned)
    return version


def unpin(core: StoreWriter, version: int) -> None:
    """Lets a pinned version go with the next compaction an hour after it was merged.

    Raises:
        StoreVersion: it is not pinned.
    """
    with core.lock:
        core.refresh()
        folder = core.folder
    if folder is None or version not in folder.pins():
        raise StoreVersion(f"version {version} of {core.path} is not pinned", path=str(core.path))
    with writing(core.path):
        (folder.pinned / str(version)).unlink(missing_ok=True)
