"""What the steps of an ingest answer: small, for the journal; texts and vectors are in parts, named here."""

import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from agentmesh.rag.documents import Chunk, Value


class Failure(BaseModel):
    """A document that is not in the store, and why."""

    source: str
    why: str


class Planned(BaseModel):
    """What there is to do; `refused` says why nothing is done."""

    parts: str = ""
    packs: list[str] = []
    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    vanished: str = ""  # the part that lists them
    failed: list[Failure] = []
    refused: str = ""


class Batch(BaseModel):
    """Chunks that are embedded and committed together."""

    part: str
    chunks: int


class Parsed(BaseModel):
    """A pack as chunks."""

    batches: list[Batch]
    bytes: int
    failed: list[Failure] = []


class Embedded(BaseModel):
    """The vectors of a batch, without those of the documents that failed."""

    part: str
    by: str = ""  # the part that says whose vectors they are; "" where there are none
    failed: list[Failure] = []


class Indexed(BaseModel):
    """What a batch brought into the store; a document in several batches counts with its last."""

    documents: int
    chunks: int
    failed: list[Failure] = []


def all_failed(documents: Sequence[Mapping[str, Any]], why: str) -> list[Failure]:
    """All documents of a pack or batch, for one reason."""
    return [Failure(source=one["source"], why=why) for one in documents]


# ---- What the steps of an ingest hand each other ------------------------------------------------

SCRATCH_FOLDER = "parts"
ABANDONED_S = 7 * 86400.0  # parts of a run that nobody has touched for so long are swept by the next ingest


class ScratchFiles:
    """The parts of one run, in a folder of their own.

    Args:
        store: the store's folder.
        name: the run's own name.
    """

    def __init__(self, store: str | Path, name: str) -> None:
        self.folder = Path(store) / SCRATCH_FOLDER / name.replace("/", "_")

    def put(self, data: bytes) -> str:
        """Keep it; answers its name, which is made of what it holds. Twice is once."""
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        made = self.folder / f".{uuid.uuid4().hex}"
        with made.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, self.folder / name)
        return name

    def get(self, name: str) -> bytes:
        """What was kept under this name.

        Raises:
            OSError: it is gone, or is not what was kept.
        """
        data = (self.folder / name).read_bytes()
        if hashlib.blake2b(data, digest_size=16).hexdigest() != name:
            raise OSError(f"part {name} in {self.folder} is damaged; add the documents again")
        return data

    def put_json(self, value: Any) -> str:
        """`put`, of plain JSON."""
        return self.put(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())

    def get_json(self, name: str) -> Any:
        """`get`, of plain JSON."""
        return json.loads(self.get(name))

    def put_vectors(self, vectors: NDArray[np.float32]) -> str:
        """`put`, of float32 (n, d)."""
        out = io.BytesIO()
        np.save(out, vectors, allow_pickle=False)
        return self.put(out.getvalue())

    def get_vectors(self, name: str) -> NDArray[np.float32]:
        """`get`, of float32 (n, d)."""
        loaded: NDArray[np.float32] = np.load(io.BytesIO(self.get(name)), allow_pickle=False)
        return loaded

    def remove(self) -> None:
        """The run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_abandoned(store: str | Path, *, older_s: float = ABANDONED_S) -> None:
    """Remove what runs left that were never taken up again."""
    with suppress(OSError), os.scandir(Path(store) / SCRATCH_FOLDER) as scan:
        for entry in scan:
            if entry.stat().st_mtime < time.time() - older_s:
                shutil.rmtree(entry.path, ignore_errors=True)


def metadata_to_json(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """Metadata as JSON; a datetime says that it is one."""
    return {k: {"$date": v.isoformat()} if isinstance(v, datetime) else v for k, v in metadata.items()}


def metadata_from_json(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """`metadata_to_json`, undone."""
    return {k: datetime.fromisoformat(v["$date"]) if isinstance(v, dict) else v for k, v in metadata.items()}


def chunks_to_json(chunks: Sequence[Chunk]) -> list[Any]:
    """Chunks of one source, without what they share."""
    return [[c.id, c.text, c.start, list(c.heading), metadata_to_json(c.metadata)] for c in chunks]


def chunks_from_json(source: str, rows: Sequence[Any]) -> Iterator[Chunk]:
    """`chunks_to_json`, undone."""
    for id, text, start, heading, metadata in rows:
        yield Chunk(id, text, source, start, tuple(heading), metadata_from_json(metadata))
