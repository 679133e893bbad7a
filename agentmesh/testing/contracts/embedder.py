"""The contract of an Embedder."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from agentmesh.rag.embedders.base import Embedder
from agentmesh.testing.contracts.base import Contract, check

TEXTS = [
    "Tea is made in the kitchen at four.", "short", "敏捷的棕色狐狸跳过懒狗。", "tea " * 3000, "half \ud800 of a pair",
]  # fmt: skip
CLOSE = 1e-3  # between vectors of one text: rounding depends on the lengths in a batch


class EmbedderContract(Contract):
    """Tests of an Embedder.

    Attributes:
        name: the name by which `embedder(name)` makes it in any process; "" for one that is only passed as an object.
        texts: the texts to embed; the vector of each must not be zero.
        scaled: whether vectors have unit length.
    """

    name = ""
    texts = TEXTS
    scaled = True

    def make(self) -> Embedder:
        """A new embedder."""
        raise NotImplementedError(f"{type(self).__name__} needs `make`")

    def test_documents_are_rows_in_the_order_of_the_texts(self) -> None:
        """float32 (n, d), and each the same as when it is embedded on its own."""
        embedder = self.make()
        rows = embedder.documents(self.texts)
        assert rows.dtype == np.float32, f"the vectors are {rows.dtype}, not float32"
        assert rows.shape == (len(self.texts), embedder.d), f"the shape is {rows.shape}, not (n, d)"
        assert np.isfinite(rows).all(), "a vector holds NaN or infinity"
        for text, row in zip(self.texts, rows, strict=True):
            alone = embedder.documents([text])[0]
            assert np.abs(row - alone).max() < CLOSE, f"{text[:20]!r} has another vector on its own"

    def test_no_texts_are_no_rows(self) -> None:
        """float32 (0, d)."""
        embedder = self.make()
        assert embedder.documents([]).shape == (0, embedder.d), "no texts must give (0, d)"

    def test_a_query_is_one_row(self) -> None:
        """float32 (d,)."""
        embedder = self.make()
        row = embedder.query(self.texts[0])
        assert row.dtype == np.float32, f"a query's vector is {row.dtype}, not float32"
        assert row.shape == (embedder.d,), f"a query's vector has the shape {row.shape}, not (d,)"
        assert np.isfinite(row).all(), "a query's vector holds NaN or infinity"

    def test_vectors_have_unit_length(self) -> None:
        """Unless `scaled` is False."""
        lengths = np.linalg.norm(self.make().documents(self.texts), axis=1)
        assert (lengths > 0).all(), "a text has the vector zero"
        if self.scaled:
            assert np.abs(lengths - 1).max() < CLOSE, "a vector is not of unit length: divide it by its norm"

    def test_another_object_makes_the_same_vectors(self) -> None:
        """A store that one worker filled is searched by others."""
        one, other = self.make(), self.make()
        one.identity.check(other.identity)
        assert one.identity.d == one.d, "the identity's width is not `d`"
        assert np.abs(one.documents(self.texts) - other.documents(self.texts)).max() < CLOSE, "it makes other vectors"

    def test_its_name_makes_it_in_another_process(self) -> None:
        """By `embedder(name)`, unless `name` is empty."""
        assert self.make().name == self.name, f"its name is {self.make().name!r}, not {self.name!r}"

    def test_threads_share_it(self) -> None:
        """Searches come from threads while documents are embedded."""
        embedder, differences = self.make(), []
        first = embedder.query(self.texts[0])

        def search() -> None:
            for _ in range(5):
                if np.abs(embedder.query(self.texts[0]) - first).max() >= CLOSE:
                    differences.append("differs")

        threads = [threading.Thread(target=search) for _ in range(4)]
        for thread in threads:
            thread.start()
        embedder.documents(self.texts)
        for thread in threads:
            thread.join()
        assert not differences, "in several threads the same text has several vectors"


def check_embedder(make: Callable[[], Embedder], **attributes: Any) -> None:
    """Run EmbedderContract against what `make` gives; `attributes` are the contract's.

    Raises:
        AssertionError: a promise is broken.
    """
    check(EmbedderContract, make, **attributes)
