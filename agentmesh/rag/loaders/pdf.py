"""PDF as text, page by page. pypdf is imported here."""

import io
import logging

from agentmesh.errors import DocumentError, ExtraMissing, well_formed
from agentmesh.rag.documents import Document, Part

try:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError
except ImportError:
    raise ExtraMissing(
        "PDF needs pypdf, which is not installed", hint="run: pip install 'agentmesh-celery[rag]'"
    ) from None

logging.getLogger("pypdf").setLevel(
    logging.CRITICAL
)  # it warns of each odd object; what cannot be read is a DocumentError


def read(data: bytes, name: str, encoding: str) -> Document:
    """The text of all pages; each page is a part with its number; a passage may span pages. See Loader.

    Raises:
        DocumentError: encrypted, broken, or a scan without text.
    """
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"{name!r} is encrypted", hint="remove its password, or leave it out")
        texts = [page.extract_text() for page in reader.pages]
    except PyPdfError as e:
        raise DocumentError(f"{name!r} cannot be read as PDF: {e}") from None
    except DocumentError:
        raise
    except DependencyError:
        raise DocumentError(
            f"{name!r} is encrypted with AES",
            hint="run: pip install cryptography, which reads those without a password",
        ) from None
    except Exception as e:  # a broken file may raise anything in the parser
        raise DocumentError(f"{name!r} cannot be read as PDF: {type(e).__name__}: {e}") from None
    parts: list[Part] = []
    out: list[str] = []
    at = 0
    for number, text in enumerate(texts, 1):
        # odd fonts give half surrogate pairs
        clean = well_formed(text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", ""))
        if clean.strip():
            parts.append(Part(at, {"page": number}))
            out.append(clean.rstrip() + "\n\n")
            at += len(out[-1])
    if not parts:
        pages = f"{len(texts)} page{'s' * (len(texts) != 1)}"
        raise DocumentError(f"{name!r} has {pages} and no text", hint="if it is a scan, recognise its text (OCR) first")
    return Document("".join(out), parts=tuple(parts))
