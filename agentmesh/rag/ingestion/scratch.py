"""What the steps of an ingest pass on: small results, for the journal, which name scratch files with texts and vectors."""

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

from agentmesh.errors import StoreDamaged
from agentmesh.rag.documents import Chunk, Value


class Failure(BaseModel):
    """A document that is not in the store, and why."""

    source: str
    why: str


class Planned(BaseModel):
    """What an ingest has to do.

    Args:
        parts: the name of the run's scratch folder.
        packs: the scratch file of each pack.
        documents: new or changed, of `bytes` together.
        skipped: unchanged documents.
        vanished: the scratch file with the vanished sources; "" for none.
        failed: what could not be listed.
        refused: why nothing is done, with `hint`; "" where the ingest continues.
    """

    parts: str = ""
    packs: list[str] = []
    documents: int = 0
    bytes: int = 0
    skipped: int = 0
    vanished: str = ""
    failed: list[Failure] = []
    refused: str = ""
    hint: str = ""


class Batch(BaseModel):
    """Chunks that are embedded and committed together; `part` is their scratch file."""

    part: str
    chunks: int


class Parsed(BaseModel):
    """A pack cut into chunks; `bytes` is the size of its documents."""

    batches: list[Batch]
    bytes: int
    failed: list[Failure] = []


class Embedded(BaseModel):
    """The vectors of a batch, without those of the documents that failed.

    Args:
        part: the scratch file with the vectors.
        by: the scratch file with the embedder's identity; "" where there are no vectors.
    """

    part: str
    by: str = ""
    failed: list[Failure] = []


class Indexed(BaseModel):
    """What the commit of a batch added; a document in several batches is counted in its last."""

    documents: int
    chunks: int
    failed: list[Failure] = []


def all_failed(documents: Sequence[Mapping[str, Any]], why: str) -> list[Failure]:
    """A Failure for each document of a pack or batch, all for one reason."""
    return [Failure(source=document["source"], why=why) for document in documents]


# ---- Scratch files ------------------------------------------------------------------------------

SCRATCH_FOLDER = "parts"
ABANDONED_S = 7 * 86400.0  # a run's scratch files that were not touched for so long are removed by the next ingest


class ScratchFiles:
    """The scratch files of one run, in a folder of their own; each is named by a hash of its content.

    Args:
        store: the store's folder.
        run: what names the folder.
    """

    def __init__(self, store: str | Path, run: str) -> None:
        self.folder = Path(store) / SCRATCH_FOLDER / run.replace("/", "_")

    def put(self, data: bytes) -> str:
        """Write a file and return its name; the same data has the same name."""
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{uuid.uuid4().hex}"
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)
        return name

    def get(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: there is none of this name.
            StoreDamaged: its content was changed.
        """
        data = (self.folder / name).read_bytes()
        if hashlib.blake2b(data, digest_size=16).hexdigest() != name:
            raise StoreDamaged(
                f"scratch file {name} in {self.folder} is damaged", hint="add the documents again", file=name
            )
        return data

    def put_json(self, value: Any) -> str:
        """`put` for JSON."""
        return self.put(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())

    def get_json(self, name: str) -> Any:
        """`get` for JSON."""
        return json.loads(self.get(name))

    def put_vectors(self, vectors: NDArray[np.float32]) -> str:
        """`put` for vectors, float32 (n, d)."""
        buffer = io.BytesIO()
        np.save(buffer, vectors, allow_pickle=False)
        return self.put(buffer.getvalue())

    def get_vectors(self, name: str) -> NDArray[np.float32]:
        """`get` for vectors, float32 (n, d)."""
        vectors: NDArray[np.float32] = np.load(io.BytesIO(self.get(name)), allow_pickle=False)
        return vectors

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def remove_abandoned(store: str | Path, *, older_s: float = ABANDONED_S) -> None:
    """Remove the scratch files of runs that failed and were not resumed."""
    with suppress(OSError), os.scandir(Path(store) / SCRATCH_FOLDER) as scan:
        for entry in scan:
            if entry.stat().st_mtime < time.time() - older_s:
                shutil.rmtree(entry.path, ignore_errors=True)


def metadata_to_json(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """Metadata as JSON; a datetime becomes `{"$date": …}`."""
    return {k: {"$date": v.isoformat()} if isinstance(v, datetime) else v for k, v in metadata.items()}


def metadata_from_json(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """The inverse of `metadata_to_json`."""
    return {k: datetime.fromisoformat(v["$date"]) if isinstance(v, dict) else v for k, v in metadata.items()}


def chunks_to_json(chunks: Sequence[Chunk]) -> list[Any]:
    """The chunks of one source as JSON, without the source."""
    return [[c.id, c.text, c.start, list(c.heading), metadata_to_json(c.metadata)] for c in chunks]


def chunks_from_json(source: str, rows: Sequence[Any]) -> Iterator[Chunk]:
    """The inverse of `chunks_to_json`."""
    for id, text, start, heading, metadata in rows:
        yield Chunk(id, text, source, start, tuple(heading), metadata_from_json(metadata))
