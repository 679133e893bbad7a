"""HTML as Markdown: the page's own text without menus and footers. trafilatura is imported here."""

import logging

from agentmesh.errors import DocumentError, ExtraMissing
from agentmesh.rag.documents import Document
from agentmesh.rag.loaders import BOMS, SNIFFED_BYTES, markdown

try:
    import trafilatura
except ImportError:
    raise ExtraMissing(
        "HTML needs trafilatura, which is not installed", hint="run: pip install 'agentmesh-celery[rag]'"
    ) from None

logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what it cannot read is a DocumentError


def read(data: bytes, name: str, encoding: str) -> Document:
    """The page as Markdown with its headings; of a page without an article, all its text; see Loader.

    Args:
        encoding: not used: a page names its own.

    Raises:
        DocumentError: it is binary, or there is no text in it.
    """
    if b"\0" in data[:SNIFFED_BYTES] and not data.startswith(tuple(bom for bom, _ in BOMS)):
        raise DocumentError(f"{name!r} is binary, not HTML", hint="leave it out, or convert it to text")
    if b"<html" not in data[:1_000_000].lower():
        data = b"<html><body>" + data + b"</body></html>"  # else a fragment is not taken for HTML
    page = trafilatura.extract(data, output_format="markdown", include_tables=True, include_comments=False)
    text = page or trafilatura.html2txt(data)
    if not text:
        raise DocumentError(f"{name!r} holds no text that a browser would show")
    return markdown(text)
