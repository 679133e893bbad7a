"""Vector search by FAISS: exact over vectors in place, and IVF,SQ8 with exact re-ranking for large segments.

Nothing else in `rag` imports FAISS.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.errors import ExtraMissing, StoreDamaged

try:
    import faiss
except ImportError:
    raise ExtraMissing(
        "a FAISS store needs faiss, which is not installed", hint="pip install 'agentmesh-celery[rag]'"
    ) from None

_faiss: Any = faiss  # SWIG declares every method as (*args)

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS without its OpenMP pool: searches run in parallel with each other, and a forked child has no such pool."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def packed(passing: npt.NDArray[np.bool_]) -> Bits:
    """A mask of rows as the bitmap that FAISS reads, uint8 (n / 8,)."""
    return np.packbits(passing, bitorder="little")


def flat(queries: Floats, vectors: Floats, k: int, metric: str, bits: Bits | None = None) -> tuple[Floats, Rows]:
    """The k nearest rows to each query, by exact search, best first.

    Args:
        queries: float32 (q, d), C order; under "cosine" of unit length, as the vectors.
        vectors: float32 (n, d), C order.
        k: at least 1, at most the number of rows that pass.
        metric: "cosine" or "l2".
        bits: the rows that pass, as `packed` makes it; None for all.

    Returns:
        Scores float32 (q, k), higher is better: the cosine, or the negative squared distance; and rows int64 (q, k).

    Source: knn_inner_product of FAISS, https://github.com/facebookresearch/faiss/blob/main/faiss/utils/distances.h
    """
    q, d = queries.shape
    scores, rows = np.empty((q, k), np.float32), np.empty((q, k), np.int64)
    selector = None if bits is None else faiss.IDSelectorBitmap(len(vectors), faiss.swig_ptr(bits))
    knn: Any = faiss.knn_inner_product if metric == "cosine" else faiss.knn_L2sqr
    # the selector holds a pointer to `bits` but no reference: both must live until this returns
    arguments: list[Any] = [faiss.swig_ptr(a) for a in (queries, vectors)] + [d, q, len(vectors), k]
    arguments += [faiss.swig_ptr(scores), faiss.swig_ptr(rows)]
    with one_thread():
        if metric == "cosine":
            knn(*arguments, selector)
        else:
            knn(*arguments, None, selector)
    return (scores if metric == "cosine" else -scores), rows


def exact(query: Floats, vectors: Floats, metric: str) -> Floats:
    """The scores of vectors, float32 (n,), as `flat` computes them."""
    if metric == "cosine":
        return np.asarray(vectors @ query)
    difference = vectors - query
    return np.asarray(-np.einsum("nd,nd->n", difference, difference))


# ---- IVF,SQ8 for large segments -----------------------------------------------------------------

IVF_ROWS = 200_000  # a merged segment with fewer rows is searched exactly
RERANK_FACTOR = 5  # candidates that are re-ranked, for each hit of the result
MIN_RERANKED = 64
TARGET_RECALL = 0.97  # recall@10 for which nprobe is chosen, measured on rows that were not used for training
SAMPLE_ROWS = 200
MAX_PROBED_SHARE = 8  # when more than 1/8 of the lists must be probed, exact search is as fast: no index then
TRAINED_PER_LIST = 40  # FAISS asks for at least 39
FILTERED_PROBES = 2  # times as many lists are probed under a filter: the nearest row that passes has a greater distance


class Ivf:
    """The vector index of one large segment.

    Raises:
        StoreDamaged: it cannot be read, or has another number of rows than the segment.
    """

    def __init__(self, path: Path, vectors: Floats, metric: str) -> None:
        try:
            self._index: Any = _faiss.read_index(str(path), _faiss.IO_FLAG_MMAP_IFC | _faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as e:
            raise StoreDamaged(f"{path.name} is damaged: {str(e).splitlines()[0]}", file=path.name) from None
        if self._index.ntotal != len(vectors):
            raise StoreDamaged(f"{path.name} has {self._index.ntotal} rows of {len(vectors)}", file=path.name)
        self._vectors, self._metric = vectors, metric

    @property
    def nprobe(self) -> int:
        """The number of lists that a search probes."""
        return int(self._index.nprobe)

    def top(self, query: Floats, k: int, bits: Bits | None) -> tuple[Floats, Rows]:
        """The k nearest rows to one query among those that pass, best first; fewer when the probed lists hold fewer.

        Returns:
            Scores float32 (n,) and rows int64 (n,), n at most k.
        """
        candidates = max(MIN_RERANKED, RERANK_FACTOR * k)
        selector = None if bits is None else _faiss.IDSelectorBitmap(len(self._vectors), _faiss.swig_ptr(bits))
        with one_thread():
            nprobe = self.nprobe if bits is None else FILTERED_PROBES * self.nprobe
            parameters = _faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
            _, nearest = self._index.search(query[None], candidates, params=parameters)
        rows = np.sort(nearest[0][nearest[0] >= 0])  # in the order of the file, so that the disk reads ahead
        scores = exact(query, self._vectors[rows], self._metric)
        best = np.argsort(-scores, kind="stable")[:k]
        return scores[best], rows[best]


def build_ivf(path: Path, vectors: Floats, metric: str, *, seed: int = 1) -> int:
    """Train, fill and write an index; nothing is written when probing enough lists would cost as much as exact search.

    Args:
        vectors: float32 (n, d), in memory or mapped.

    Returns:
        The number of lists that a search probes; 0 when no index was written.
    """
    n, d = vectors.shape
    lists = int(4 * np.sqrt(n))
    kind = _faiss.METRIC_INNER_PRODUCT if metric == "cosine" else _faiss.METRIC_L2
    quantizer = _faiss.IndexFlat(d, kind)
    index = _faiss.IndexIVFScalarQuantizer(quantizer, d, lists, _faiss.ScalarQuantizer.QT_8bit, kind)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.seed = 6, TRAINED_PER_LIST, seed
    shuffled = np.random.default_rng(seed).permutation(n)
    index.train(vectors[np.sort(shuffled[: lists * TRAINED_PER_LIST])])
    for first in range(0, n, 65_536):
        index.add(np.ascontiguousarray(vectors[first : first + 65_536]))
    index.nprobe = _choose_nprobe(index, vectors, metric, shuffled[-SAMPLE_ROWS:], lists // MAX_PROBED_SHARE)
    if index.nprobe:
        _faiss.write_index(index, str(path))
    return int(index.nprobe)


def _choose_nprobe(index: Any, vectors: Floats, metric: str, sample: Rows, max_probes: int) -> int:
    """The fewest lists that reach TARGET_RECALL for a sample of rows; 0 if that takes more than `max_probes`."""
    sample = np.sort(sample)
    queries = np.ascontiguousarray(vectors[sample])
    _, nearest = flat(queries, vectors, 11, metric)
    true_neighbours = [set(rows) - {own} for rows, own in zip(nearest.tolist(), sample.tolist(), strict=True)]
    nprobe = 4
    while nprobe <= max_probes:
        index.nprobe = nprobe
        _, candidates = index.search(queries, MIN_RERANKED + 1)
        hits = sum(len(set(rows) & true) for rows, true in zip(candidates.tolist(), true_neighbours, strict=True))
        if hits >= TARGET_RECALL * sum(map(len, true_neighbours)):
            return nprobe
        nprobe += max(2, nprobe // 4)
    return 0
