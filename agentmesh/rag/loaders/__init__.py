"""From a file to text, by a loader for its kind: plain text and Markdown are here, the others beside, one a file."""

import codecs
import re
import stat
from collections.abc import Iterator
from functools import lru_cache
from mimetypes import guess_type
from pathlib import Path, PurePath
from typing import Protocol

from agentmesh import plugins
from agentmesh.errors import DocumentError, MeshError
from agentmesh.rag.documents import Document, Heading

_HASHES = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_FRONT_MATTER = re.compile(r"---\n[\w-]+[ \t]*:(?s:.)*?\n(---|\.\.\.)[ \t]*(\n|$)")
_NOT_A_TITLE = re.compile(r"[ \t]*([-*+>|]|\d+[.)])([ \t]|$)|    |\t")  # lists, quotes, tables, code
_MARKUP = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|[*_`]+(\S(?:.*?\S)?)[*_`]+")


def markdown(text: str) -> Document:
    """A document with the places of its headings.

    >>> [(h.level, h.text, h.start) for h in markdown("# A\\n\\ntext\\n\\nB\\n-\\n").headings]
    [(1, 'A', 0), (2, 'B', 11)]

    Source: CommonMark 0.31 sections 4.2, 4.3 and 4.5, https://spec.commonmark.org
    """
    return Document(text, tuple(_headings(text)))


def _headings(text: str) -> Iterator[Heading]:
    fence, before, before_at, at = "", "", 0, 0
    front_matter = _FRONT_MATTER.match(text) is not None
    for n, line in enumerate(text.split("\n")):
        if front_matter:
            front_matter = n == 0 or line.rstrip() not in ("---", "...")
            before = ""
        elif fence:
            if (closing := _FENCE.match(line)) and line.strip() == closing[1] and closing[1].startswith(fence):
                fence = ""
            before = ""
        elif opening := _FENCE.match(line):
            fence, before = opening[1], ""
        elif hashes := _HASHES.match(line):
            yield Heading(at, len(hashes[1]), _plain_title(hashes[2] or ""), at + len(line))
            before = ""
        elif before and (underline := _UNDERLINE.match(line)):
            yield Heading(before_at, 1 if underline[1][0] == "=" else 2, _plain_title(before), at + len(line))
            before = ""
        else:
            # only a paragraph of one line can be a title
            alone = not before and not _NOT_A_TITLE.match(line) and text[max(0, at - 2) : at] in ("", "\n", "\n\n")
            before, before_at = (line.strip(), at) if alone else ("", at)
        at += len(line) + 1


def _plain_title(title: str) -> str:
    return _MARKUP.sub(lambda m: m[1] or m[2] or "", title).strip()


# ---- files ---------------------------------------------------------------------------------------

MAX_FILE_BYTES = 64 * 1024 * 1024
SNIFFED_BYTES = 8192  # in which a zero byte means that a file is binary
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


def load_document(path: str | Path, *, encoding: str = "utf-8", max_bytes: int = MAX_FILE_BYTES) -> Document:
    """A file as text with its headings.

    Args:
        encoding: of text files, unless they begin with a byte order mark.

    Raises:
        DocumentError: missing, too large, binary, encrypted, in another encoding, without text.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # reading a pipe would not end
            raise DocumentError(f"{path.name!r} is not a file", source=str(path))
        if status.st_size > max_bytes:
            raise DocumentError(
                f"{path.name!r} has {status.st_size / 2**20:.0f} MiB, more than the {max_bytes / 2**20:.0f} MiB "
                "that are read at once",
                hint="split it",
                source=str(path),
            )
        data = path.read_bytes()
    except OSError as e:
        raise DocumentError(f"{path.name!r} cannot be read: {e.strerror or e}", source=str(path)) from None
    return parse(data, path.name, encoding=encoding)


class Loader(Protocol):
    """Bytes of one kind of file to a Document: a function, declared in the entry-point group `agentmesh.loaders`.

    Its entry is named by the suffix without the dot (`epub`), or by a media type (`application/epub+zip`), which is for
    every suffix that Python's mimetypes knows to be of it.
    """

    def __call__(self, data: bytes, name: str, encoding: str) -> Document:
        """The document.

        Args:
            name: the file's name, for errors.
            encoding: of text without a byte order mark; `decode` does both.

        Raises:
            DocumentError: it cannot be read. Anything else that is raised becomes one that names the loader.
        """
        ...


def parse(data: bytes, name: str, *, encoding: str = "utf-8") -> Document:
    """As `load_document`, of bytes in memory; the suffix of the name says what they are, and an unknown one is text.

    Raises:
        DocumentError: see `load_document`.
        ConfigError: the loader of a plugin cannot be imported.
    """
    kind = _loader_name(name) or "txt"
    read: Loader = plugins.load_plugin("loaders", kind)
    try:
        document = read(data, name, encoding)
    except DocumentError as e:
        raise e.with_fields(source=name) from None
    except MeshError:
        raise
    except Exception as e:
        raise DocumentError(
            f"{name!r} cannot be read: its loader {kind!r} raised {type(e).__name__}: {e}", source=name
        ) from e
    if not document.text.strip():
        raise DocumentError(f"{name!r} holds no text", source=name)
    return document


def knows(path: str | Path) -> bool:
    """Whether there is a loader for files of this name: others are read only where they are named themselves."""
    return bool(_loader_name(str(path)))


def _loader_name(name: str) -> str:
    """The entry for a file of this name; "" where there is none."""
    return _loader_of_suffix(PurePath(name).suffix.lower())


@lru_cache
def _loader_of_suffix(suffix: str) -> str:
    by_media_type = guess_type(f"x{suffix}", strict=False)[0] or ""
    candidates = (suffix.removeprefix("."), by_media_type) if suffix else ()
    return next((one for one in candidates if one and plugins.find("loaders", one) is not None), "")


def decode(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Bytes as text with `\\n` line ends.

    Raises:
        DocumentError: they are binary, or in another encoding.
    """
    actual = next((of_bom for bom, of_bom in BOMS if data.startswith(bom)), encoding)
    if actual == encoding and b"\0" in data[:SNIFFED_BYTES] and not encoding.lower().startswith(("utf-16", "utf-32")):
        raise DocumentError(f"{name!r} is binary, not text", hint="leave it out, or convert it to text")
    try:
        text = data.decode(actual)
    except UnicodeDecodeError as e:
        place = f"0x{data[e.start]:02x}" if e.start < len(data) else "its end"
        raise DocumentError(
            f"{name!r} is not {actual} ({place} at byte {e.start})", hint="convert it, or name its encoding"
        ) from None
    except LookupError:
        raise DocumentError(f"unknown encoding {actual!r}", hint="use one such as 'utf-8' or 'cp1252'") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(data: bytes, name: str, encoding: str) -> Document:
    """Plain text; see Loader."""
    return Document(decode(data, name, encoding))


def read_markdown(data: bytes, name: str, encoding: str) -> Document:
    """Markdown with its headings; see Loader."""
    return markdown(decode(data, name, encoding))
