"""IVF,SQ8 for segments too large to be searched whole: 8 bits a number to find candidates, the exact vectors to rank them."""

from pathlib import Path
from typing import Any

import numpy as np

from agentmesh.errors import StoreDamaged
from agentmesh.rag.index import Bits, Floats, Rows, exact, flat, library, one_thread

faiss: Any = library

IVF_ROWS = 200_000  # a merged segment with fewer rows is searched exactly
RANKED = 5  # candidates for each hit that is asked for
LEAST_RANKED = 64
RECALL = 0.97  # recall@10 that the number of lists to look into is chosen for, on the segment's own rows
SAMPLE = 200
TRAINED_PER_LIST = 50
"""k-means sees this many rows a list; FAISS asks for 39 at least."""


class Ivf:
    """The index beside one large segment."""

    def __init__(self, path: Path, vectors: Floats, metric: str) -> None:
        try:
            self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as e:
            raise StoreDamaged(f"{path.name} is damaged: {str(e).splitlines()[0]}", file=path.name) from None
        self._vectors, self._metric = vectors, metric

    @property
    def nprobe(self) -> int:
        """How many lists a search looks into."""
        return int(self._index.nprobe)

    def top(self, query: Floats, k: int, bits: Bits | None) -> tuple[Floats, Rows]:
        """The nearest rows to one query among those that pass, best first; fewer than k if too few were found."""
        wanted = max(LEAST_RANKED, RANKED * k)
        selector = None if bits is None else faiss.IDSelectorBitmap(len(self._vectors), faiss.swig_ptr(bits))
        with one_thread():
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=self.nprobe)
            _, found = self._index.search(query[None], wanted, params=parameters)
        rows = np.sort(found[0][found[0] >= 0])  # in the order of the file, which is kinder to the disk
        scores = exact(query, self._vectors[rows], self._metric)
        best = np.argsort(-scores, kind="stable")[:k]
        return scores[best], rows[best]


def build_ivf(path: Path, vectors: Floats, metric: str, *, seed: int = 1) -> int:
    """Trains, fills and writes an index, and answers the number of lists a search will look into.

    Args:
        vectors: float32 (n, d), also mapped.
    """
    n, d = vectors.shape
    lists = int(4 * np.sqrt(n))
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    quantizer = faiss.IndexFlat(d, kind)
    index = faiss.IndexIVFScalarQuantizer(quantizer, d, lists, faiss.ScalarQuantizer.QT_8bit, kind)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.seed = 8, TRAINED_PER_LIST, seed
    some = np.random.default_rng(seed).permutation(n)[: lists * TRAINED_PER_LIST]
    index.train(vectors[np.sort(some)])
    for first in range(0, n, 65_536):
        index.add(np.ascontiguousarray(vectors[first : first + 65_536]))
    index.nprobe = _probes(index, vectors, metric, some[:SAMPLE], lists)
    faiss.write_index(index, str(path))
    return int(index.nprobe)


def _probes(index: Any, vectors: Floats, metric: str, sample: Rows, lists: int) -> int:
    """The fewest lists that find 97 % of the ten nearest of some rows; never more than a quarter of all."""
    queries = np.ascontiguousarray(vectors[np.sort(sample)])
    _, nearest = flat(queries, vectors, 10, metric)
    nprobe = 4
    while nprobe < lists // 4:
        index.nprobe = nprobe
        _, found = index.search(queries, LEAST_RANKED)
        hits = [len(set(a) & set(b)) for a, b in zip(nearest.tolist(), found.tolist(), strict=True)]
        if sum(hits) >= RECALL * 10 * len(hits):
            break
        nprobe *= 2
    return nprobe
