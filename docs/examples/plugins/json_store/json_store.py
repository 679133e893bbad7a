"""A store of passages in one JSON file, for a few thousand of them: `json:notes.json`. Each call reads the file."""

import json
import os
import threading
from pathlib import Path

import numpy as np

from agentmesh.rag.documents import Chunk, Hit
from agentmesh.rag.ingestion.scratch import metadata_from_json, metadata_to_json
from agentmesh.rag.store.filters import matches, parse_filter


class JsonStore:
    """See VectorStore."""

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()

    def upsert(self, chunks, vectors):
        """See VectorStore."""
        rows = [[c.id, c.text, c.source, c.start, list(c.heading), metadata_to_json(c.metadata)] for c in chunks]
        self._write(
            lambda kept: kept | {row[0]: [row, np.asarray(v).tolist()] for row, v in zip(rows, vectors, strict=True)}
        )

    def delete(self, ids):
        """See VectorStore."""
        self._write(lambda kept: {i: row for i, row in kept.items() if i not in set(ids)})

    def remove(self, sources):
        """See VectorStore."""
        self._write(lambda kept: {i: row for i, row in kept.items() if row[0][2] not in set(sources)})

    def search(self, vector, k, *, where=None):
        """See VectorStore."""
        scored = [(float(np.dot(vector, row)), chunk) for chunk, row in self._read(where)]
        return _hits(sorted(scored, key=lambda one: -one[0])[:k])

    def search_text(self, query, k, *, where=None):
        """See VectorStore."""
        words = query.lower().split()
        scored = [(sum(w in chunk.text.lower() for w in words), chunk) for chunk, _ in self._read(where)]
        return _hits(sorted([one for one in scored if one[0]], key=lambda one: -one[0])[:k])

    def count(self, where=None):
        """See VectorStore."""
        return len(self._read(where))

    def sources(self):
        """See VectorStore."""
        return {chunk.source: {} for chunk, _ in self._read()}

    def _load(self):
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def _write(self, change):
        with self.lock:
            new = self.path.with_name(f"{self.path.name}.new")
            new.write_text(json.dumps(change(self._load())))
            os.replace(new, self.path)

    def _read(self, where=None):
        test = parse_filter(where) if where else None
        rows = [(Chunk(*c[:4], tuple(c[4]), metadata_from_json(c[5])), v) for c, v in self._load().values()]
        return [row for row in rows if test is None or matches(test, {"source": row[0].source, **row[0].metadata})]


def _hits(scored):
    return [Hit(c.id, c.text, c.source, c.start, score, c.heading, c.metadata) for score, c in scored]
