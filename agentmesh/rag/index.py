"""The rooms' only door to FAISS: exact search where the vectors lie, and IVF,SQ8 with exact re-ranking for large segments."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from agentmesh.errors import ExtraMissing

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
