"""The contract of a Loader."""

import json
import random
from collections.abc import Callable
from typing import Any

from agentmesh.errors import DocumentError
from agentmesh.rag.documents import Document
from agentmesh.rag.ingestion.scratch import metadata_to_json
from agentmesh.rag.loaders import Loader
from agentmesh.testing.contracts.base import Contract, check


class LoaderContract(Contract):
    """Tests of a Loader.

    Attributes:
        name: the name of a file that it reads.
        data: the bytes of that file.
        holds: text that the document must contain.
    """

    name = "file.txt"
    data = b"some text"
    holds = "some text"

    def make(self) -> Loader:
        """The loader, which is a function."""
        raise NotImplementedError(f"{type(self).__name__} needs `make`")

    def _read(self, data: bytes | None = None) -> Document:
        return self.make()(self.data if data is None else data, self.name, "utf-8")

    def test_the_document_has_the_text_of_the_file(self) -> None:
        """And every reading gives the same, because a retried step splits the document again."""
        document = self._read()
        assert isinstance(document, Document), f"it returned {document!r}, which is not a Document"
        assert self.holds in document.text, f"{self.holds!r} is not in {document.text[:200]!r}"
        assert self._read() == document, "a second reading returned another document"

    def test_headings_and_parts_are_positions_in_the_text(self) -> None:
        """In the order of their starts."""
        document = self._read()
        for name, sections in (("headings", document.headings), ("parts", document.parts)):
            starts = [section.start for section in sections]
            assert starts == sorted(starts), f"{name} are not in the order of their starts"
            assert all(0 <= start <= len(document.text) for start in starts), f"{name} begin outside of the text"

    def test_metadata_is_json(self) -> None:
        """Text, numbers, dates, lists of text."""
        document = self._read()
        for metadata in (document.metadata, *(part.metadata for part in document.parts)):
            json.dumps(metadata_to_json(metadata), allow_nan=False)

    def test_what_it_cannot_read_is_a_document_error(self) -> None:
        """Or a document. It raises nothing else, and it returns."""
        noise = random.Random(1)
        damaged = [b"", self.data[: len(self.data) // 2], b"\0" * 100, noise.randbytes(5000), self.data[::-1]]
        for data in damaged:
            try:
                document = self._read(data)
            except DocumentError as e:
                if not str(e):
                    raise AssertionError(f"{data[:20]!r} raised a DocumentError without a message") from e
            except Exception as e:
                raise AssertionError(f"{data[:20]!r} raised {type(e).__name__}: {e}; raise a DocumentError") from e
            else:
                assert isinstance(document, Document), f"{data[:20]!r} gave {document!r}, which is not a Document"
                document.text.encode()  # a lone surrogate cannot be stored


def check_loader(make: Callable[[], Loader], **attributes: Any) -> None:
    """Run LoaderContract against what `make` gives; `attributes` are the contract's.

    Raises:
        AssertionError: a promise is broken.
    """
    check(LoaderContract, make, **attributes)
