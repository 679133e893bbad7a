"""How documents are added, and where they come from."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from agentmesh.errors import DefinitionError
from agentmesh.rag.documents import Value
from agentmesh.rag.ingestion.plan import ChunkOptions, IngestRequest
from agentmesh.rag.ingestion.scratch import metadata_to_json

WINDOW = 8  # packs in flight; bounds the scratch files on disk
Paths = str | Path | Iterable[str | Path]


class AddOptions(TypedDict, total=False):
    """How documents are added; what is left out is as `read_options` has it.

    Attributes:
        glob: which files of the folders, such as `**/*.md`; every kind that a loader knows when left out.
        label: what the sources' names begin with; each folder's own name when left out.
        size: characters in a passage, at most.
        overlap: characters that a passage shares with the one before.
        encoding: of text files.
        metadata: of every passage, for `where`.
        sync: documents that vanished from these folders leave the store.
        force: also when a folder is empty, or more than half of it vanished.
        window: packs of documents in flight at once.
    """

    glob: str
    label: str
    size: int
    overlap: int
    encoding: str
    metadata: Mapping[str, Value] | None
    sync: bool
    force: bool
    window: int


def check_paths(request: IngestRequest) -> None:
    """Check that all paths of an ingest exist.

    Raises:
        DefinitionError: one does not, or a file is to be synced.
    """
    for path in request.paths:
        if not os.path.exists(path):
            raise DefinitionError(
                f"there is no folder or file {path!r}", hint="name one that exists, on the workers' machines as well"
            )
        if request.sync and not os.path.isdir(path):
            raise DefinitionError(
                f"sync compares folders with the store, and {path!r} is a file", hint="name its folder"
            )


def read_options(
    paths: Paths, *, glob: str = "", label: str = "", size: int = 1000, overlap: int = 150, encoding: str = "utf-8",
    metadata: Mapping[str, Value] | None = None, sync: bool = False, force: bool = False, window: int = WINDOW,
) -> tuple[IngestRequest, ChunkOptions, int]:  # fmt: skip
    """What is asked of an ingest, how it cuts documents, and how many packs are in flight at once.

    Raises:
        DefinitionError: an argument is out of range.
    """
    if window < 1:
        raise DefinitionError(f"window={window} is below 1", hint="use at least 1")
    if size < 1 or not 0 <= overlap < size:
        raise DefinitionError(
            f"size={size}, overlap={overlap} are out of range", hint="use a size of at least 1 and a smaller overlap"
        )
    absolute = [os.path.abspath(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    request = IngestRequest(paths=absolute, glob=glob, label=label, sync=sync, force=force)
    chunking = ChunkOptions(size=size, overlap=overlap, encoding=encoding, metadata=metadata_to_json(metadata or {}))
    return request, chunking, window
