"""Import a folder that LangChain's own FAISS store saved."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.embeddings import Embeddings

from agentmesh.errors import DefinitionError, EmbedderMismatch, StoreError
from agentmesh.langchain.vectorstore import BATCH, chunk_of
from agentmesh.rag.embedders import embedder
from agentmesh.rag.embedders.base import Embedder
from agentmesh.rag.store.faiss_store import FaissStore

MIN_COSINE = 0.98  # of the first document's vector to the one that the embedder makes of it now
READER_TIMEOUT_S = 3600
READER = Path(__file__).with_name("unpickle.py")  # run, never imported


def import_folder(
    folder: str | Path, path: str | Path, *, embedding: Embeddings | Embedder | str | None = None, trust_pickle: bool = False,
    index_name: str = "index", progress: Callable[[int, int], None] | None = None,
) -> FaissStore:  # fmt: skip
    """A store with everything from an old folder: texts, metadata, ids, vectors, metric. May be repeated.

    The pickle is read in a separate process, by a reader that knows the classes of a docstore and refuses all others.

    Args:
        folder: holds `index.faiss` and `index.pkl`.
        path: of the store, new or made by an earlier attempt.
        embedding: what the vectors were made with, as `embedder` takes it; its first document is compared.
        trust_pickle: must be True, since a pickle may hold code.
        progress: called with the number of documents imported so far, and of all.

    Raises:
        DefinitionError: `trust_pickle` is not True.
        StoreError: the folder cannot be read, or names a class that a docstore does not need.
        EmbedderMismatch: `embedding` makes different vectors.
    """
    folder = Path(folder)
    if missing := [n for n in (f"{index_name}.faiss", f"{index_name}.pkl") if not (folder / n).is_file()]:
        raise StoreError(f"{folder} is not a folder saved by LangChain's FAISS store: it has no {missing[0]}")
    if not trust_pickle:
        raise DefinitionError(
            f"{folder / (index_name + '.pkl')} is a pickle", hint="give trust_pickle=True if you trust it"
        )
    with tempfile.TemporaryDirectory(prefix="agentmesh-import-") as scratch:
        out = Path(scratch)
        # -P: no module is imported from the folder of the script
        argv = [sys.executable, "-P", str(READER), str(folder.resolve()), index_name, scratch]
        process = subprocess.run(
            argv, capture_output=True, text=True, timeout=READER_TIMEOUT_S, cwd=scratch, check=False
        )
        if process.returncode:
            reason = (process.stderr.strip().splitlines() or [f"its reader ended with {process.returncode}"])[-1]
            raise StoreError(f"{folder} cannot be imported: {reason}")
        about = json.loads((out / "about.json").read_bytes())
        return _import_documents(out, about, Path(path), embedding, progress)


def _import_documents(
    out: Path, about: dict[str, Any], path: Path, embedding: Embeddings | Embedder | str | None, progress: Callable[[int, int], None] | None
) -> FaissStore:  # fmt: skip
    vectors = np.load(out / "vectors.npy", mmap_mode="r")  # (n, d)
    model = None if embedding is None else embedder(embedding)
    store = FaissStore(path, metric=about["metric"], identity=model.identity if model else None)
    with (out / "documents.jsonl").open() as lines:
        at = 0
        while records := [json.loads(line) for line in islice(lines, BATCH)]:
            chunks = [chunk_of(r["id"], r["text"], r["metadata"]) for r in records]
            batch = np.array(vectors[at : at + len(records)])
            if model and not at:
                _compare(model, chunks[0].text, batch[0])
            store.upsert(chunks, batch)
            at += len(records)
            if progress:
                progress(at, about["n"])
    return store


def _compare(model: Embedder, text: str, vector: Any) -> None:
    cosine = float(np.dot(model.documents([text])[0], vector / np.linalg.norm(vector))) if len(vector) == model.d else 0
    if not cosine >= MIN_COSINE:
        raise EmbedderMismatch(
            f"{model.identity.name!r} did not make these vectors: the first document has a cosine of {cosine:.3f}",
            hint="name the embedder that made them",
        )
