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
RECALL = 0.97  # recall@10 that the number of lists to look into is chosen for, with rows that trained nothing
SAMPLE = 200
MOST = 8  # if more than an eighth of the lists is needed, exact search is as quick: vectors without any structure
TRAINED_PER_LIST = 40  # FAISS asks for 39 at least
FILTERED = 2  # under a filter twice as many lists: a nearest one that passes is further away


class Ivf:
    """The index beside one large segment."""

    def __init__(self, path: Path, vectors: Floats, metric: str) -> None:
        try:
            self._index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as e:
            raise StoreDamaged(f"{path.name} is damaged: {str(e).splitlines()[0]}", file=path.name) from None
        if self._index.ntotal != len(vectors):
            raise StoreDamaged(f"{path.name} has {self._index.ntotal} rows of {len(vectors)}", file=path.name)
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
            nprobe = self.nprobe if bits is None else FILTERED * self.nprobe
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
            _, found = self._index.search(query[None], wanted, params=parameters)
        rows = np.sort(found[0][found[0] >= 0])  # in the order of the file, which is kinder to the disk
        scores = exact(query, self._vectors[rows], self._metric)
        best = np.argsort(-scores, kind="stable")[:k]
        return scores[best], rows[best]


def build_ivf(path: Path, vectors: Floats, metric: str, *, seed: int = 1) -> int:
    """Trains, fills and writes an index; answers how many lists a search looks into, 0 when no index would pay.

    Args:
        vectors: float32 (n, d), also mapped.
    """
    n, d = vectors.shape
    lists = int(4 * np.sqrt(n))
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    quantizer = faiss.IndexFlat(d, kind)
    index = faiss.IndexIVFScalarQuantizer(quantizer, d, lists, faiss.ScalarQuantizer.QT_8bit, kind)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.seed = 6, TRAINED_PER_LIST, seed
    shuffled = np.random.default_rng(seed).permutation(n)
    index.train(vectors[np.sort(shuffled[: lists * TRAINED_PER_LIST])])
    for first in range(0, n, 65_536):
        index.add(np.ascontiguousarray(vectors[first : first + 65_536]))
    index.nprobe = _probes(index, vectors, metric, shuffled[-SAMPLE:], lists // MOST)
    if index.nprobe:
        faiss.write_index(index, str(path))
    return int(index.nprobe)


def _probes(index: Any, vectors: Floats, metric: str, sample: Rows, most: int) -> int:
    """The fewest lists that find 97 % of the ten nearest neighbours of some rows; 0 if that takes more than `most`."""
    sample = np.sort(sample)
    queries = np.ascontiguousarray(vectors[sample])
    _, nearest = flat(queries, vectors, 11, metric)
    right = [set(rows) - {own} for rows, own in zip(nearest.tolist(), sample.tolist(), strict=True)]
    nprobe = 4
    while nprobe <= most:
        index.nprobe = nprobe
        _, found = index.search(queries, LEAST_RANKED + 1)
        hits = sum(len(set(rows) & r) for rows, r in zip(found.tolist(), right, strict=True))
        if hits >= RECALL * sum(map(len, right)):
            return nprobe
        nprobe += max(2, nprobe // 4)
    return 0
