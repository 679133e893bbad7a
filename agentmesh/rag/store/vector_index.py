"""The rooms' only door to FAISS: exact search where the vectors lie, and IVF,SQ8 with exact re-ranking for large segments."""

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
        "a FAISS store needs faiss, which is not installed: pip install 'agentmesh-celery[rag]'"
    ) from None

library: Any = faiss  # its own types are those of SWIG: (*args)

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8]


@contextmanager
def one_thread() -> Iterator[None]:
    """FAISS on this thread alone: many searches run beside each other, and a forked child has no pool to wait for."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def packed(passing: npt.NDArray[np.bool_]) -> Bits:
    """Rows as the bitmap that FAISS reads."""
    return np.packbits(passing, bitorder="little")


def flat(queries: Floats, vectors: Floats, k: int, metric: str, bits: Bits | None = None) -> tuple[Floats, Rows]:
    """The k nearest rows to each query, exactly, best first.

    Args:
        queries: float32 (q, d), C order; under "cosine" of unit length, as the vectors.
        k: at least 1, at most the number of rows that pass.
        metric: "cosine" or "l2".
        bits: the rows that pass, packed; None for all.

    Returns:
        Scores float32 (q, k), higher is better: the cosine, or the negative squared distance; and rows.

    Source: knn_inner_product of FAISS, https://github.com/facebookresearch/faiss/blob/main/faiss/utils/distances.h
    """
    q, d = queries.shape
    scores, rows = np.empty((q, k), np.float32), np.empty((q, k), np.int64)
    selector = None if bits is None else faiss.IDSelectorBitmap(len(vectors), faiss.swig_ptr(bits))
    knn: Any = faiss.knn_inner_product if metric == "cosine" else faiss.knn_L2sqr
    # the selector refers to `bits` without holding it; both live until this returns
    arguments: list[Any] = [faiss.swig_ptr(a) for a in (queries, vectors)] + [d, q, len(vectors), k]
    arguments += [faiss.swig_ptr(scores), faiss.swig_ptr(rows)]
    with one_thread():
        if metric == "cosine":
            knn(*arguments, selector)
        else:
            knn(*arguments, None, selector)
    return (scores if metric == "cosine" else -scores), rows


def exact(query: Floats, vectors: Floats, metric: str) -> Floats:
    """The scores of some vectors, as `flat` gives them."""
    if metric == "cosine":
        return np.asarray(vectors @ query)
    apart = vectors - query
    return np.asarray(-np.einsum("nd,nd->n", apart, apart))


# ---- IVF,SQ8 for segments too large to be searched whole ----------------------------------------

_faiss: Any = library

IVF_ROWS = 200_000  # a merged segment with fewer rows is searched exactly
RERANK_FACTOR = 5  # candidates for each hit that is asked for
MIN_RERANKED = 64
RECALL = 0.97  # recall@10 that the number of lists to look into is chosen for, with rows that trained nothing
SAMPLE = 200
MAX_PROBES_SHARE = (
    8  # if more than an eighth of the lists is needed, exact search is as quick: vectors without any structure
)
TRAINED_PER_LIST = 40  # FAISS asks for 39 at least
FILTERED = 2  # under a filter twice as many lists: a nearest one that passes is further away


class Ivf:
    """The index beside one large segment."""

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
        """How many lists a search looks into."""
        return int(self._index.nprobe)

    def top(self, query: Floats, k: int, bits: Bits | None) -> tuple[Floats, Rows]:
        """The nearest rows to one query among those that pass, best first; fewer than k if too few were found."""
        wanted = max(MIN_RERANKED, RERANK_FACTOR * k)
        selector = None if bits is None else _faiss.IDSelectorBitmap(len(self._vectors), _faiss.swig_ptr(bits))
        with one_thread():
            nprobe = self.nprobe if bits is None else FILTERED * self.nprobe
            parameters = _faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
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
    kind = _faiss.METRIC_INNER_PRODUCT if metric == "cosine" else _faiss.METRIC_L2
    quantizer = _faiss.IndexFlat(d, kind)
    index = _faiss.IndexIVFScalarQuantizer(quantizer, d, lists, _faiss.ScalarQuantizer.QT_8bit, kind)
    index.cp.niter, index.cp.max_points_per_centroid, index.cp.seed = 6, TRAINED_PER_LIST, seed
    shuffled = np.random.default_rng(seed).permutation(n)
    index.train(vectors[np.sort(shuffled[: lists * TRAINED_PER_LIST])])
    for first in range(0, n, 65_536):
        index.add(np.ascontiguousarray(vectors[first : first + 65_536]))
    index.nprobe = _probes(index, vectors, metric, shuffled[-SAMPLE:], lists // MAX_PROBES_SHARE)
    if index.nprobe:
        _faiss.write_index(index, str(path))
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
        _, found = index.search(queries, MIN_RERANKED + 1)
        hits = sum(len(set(rows) & r) for rows, r in zip(found.tolist(), right, strict=True))
        if hits >= RECALL * sum(map(len, right)):
            return nprobe
        nprobe += max(2, nprobe // 4)
    return 0
