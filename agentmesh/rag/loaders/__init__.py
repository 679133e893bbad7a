"""From a file to text: plain text, Markdown, HTML, PDF, CSV, JSON lines. Bad input is a DocumentError with its sentence."""

import codecs
import csv
import io
import json
import math
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

from agentmesh.errors import DocumentError
from agentmesh.rag.documents import Document, Heading, Part, Value

_HASHES = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_FRONT_MATTER = re.compile(r"---\n[\w-]+[ \t]*:(?s:.)*?\n(---|\.\.\.)[ \t]*(\n|$)")
_NO_TITLE = re.compile(r"[ \t]*([-*+>|]|\d+[.)])([ \t]|$)|    |\t")  # lists, quotes, tables, code
_MARKUP = re.compile(r"!?\[([^\]]*)\]\([^)]*\)|[*_`]+(\S(?:.*?\S)?)[*_`]+")


def markdown(text: str) -> Document:
    """A document whose headings know where they stand.

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
        elif found := _HASHES.match(line):
            yield Heading(at, len(found[1]), _plain_title(found[2] or ""), at + len(line))
            before = ""
        elif before and (found := _UNDERLINE.match(line)):
            yield Heading(before_at, 1 if found[1][0] == "=" else 2, _plain_title(before), at + len(line))
            before = ""
        else:
            # only a paragraph of one line is taken for a title
            alone = not before and not _NO_TITLE.match(line) and text[max(0, at - 2) : at] in ("", "\n", "\n\n")
            before, before_at = (line.strip(), at) if alone else ("", at)
        at += len(line) + 1


def _plain_title(title: str) -> str:
    return _MARKUP.sub(lambda m: m[1] or m[2] or "", title).strip()


# ---- From a file to text ------------------------------------------------------------------------

LARGEST_BYTES = 64 * 1024 * 1024
SNIFFED_BYTES = 8192
TEXT_FIELDS = ("text", "content", "body", "page_content")  # of a JSON line, the first that is there
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip


def load(path: str | Path, *, encoding: str = "utf-8", largest_bytes: int = LARGEST_BYTES) -> Document:
    """A file as text with its headings.

    Args:
        encoding: of text files; a byte order mark goes before it.

    Raises:
        DocumentError: missing, too large, binary, encrypted, in another encoding, without text.
    """
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):  # reading a pipe would not end
            raise DocumentError(f"{path.name!r} is not a file", source=str(path))
        if found.st_size > largest_bytes:
            raise DocumentError(
                f"{path.name!r} has {found.st_size / 2**20:.0f} MiB, more than the {largest_bytes / 2**20:.0f} MiB "
                "that are read at once",
                hint="split it",
                source=str(path),
            )
        data = path.read_bytes()
    except OSError as e:
        raise DocumentError(f"{path.name!r} cannot be read: {e.strerror or e}", source=str(path)) from None
    return parse(data, path.name, encoding=encoding)


def parse(data: bytes, name: str, *, encoding: str = "utf-8") -> Document:
    """What `load` gives, of bytes in hand; the name's ending says what they are.

    Raises:
        DocumentError: see `load`.
    """
    try:
        document = _KINDS.get(PurePath(name).suffix.lower(), _text)(data, name, encoding)
    except DocumentError as e:
        raise e.with_fields(source=name) from None
    if not document.text.strip():
        raise DocumentError(f"{name!r} holds no text", source=name)
    return document


def knows(path: str | Path) -> bool:
    """Whether a file of this name is read without being asked for by name."""
    return PurePath(path).suffix.lower() in _KINDS


def decode(data: bytes, name: str, encoding: str = "utf-8") -> str:
    """Bytes as text with `\\n` line ends.

    Raises:
        DocumentError: they are binary, or in another encoding.
    """
    said = next((known for bom, known in BOMS if data.startswith(bom)), encoding)
    if said == encoding and b"\0" in data[:SNIFFED_BYTES] and not encoding.lower().startswith(("utf-16", "utf-32")):
        raise DocumentError(f"{name!r} is binary, not text", hint="leave it out, or give a text of it")
    try:
        text = data.decode(said)
    except UnicodeDecodeError as e:
        shown = f"0x{data[e.start]:02x}" if e.start < len(data) else "its end"
        raise DocumentError(
            f"{name!r} is not {said} ({shown} at byte {e.start})", hint="convert it, or name its encoding"
        ) from None
    except LookupError:
        raise DocumentError(f"unknown encoding {said!r}", hint="use one such as 'utf-8' or 'cp1252'") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _text(data: bytes, name: str, encoding: str) -> Document:
    return Document(decode(data, name, encoding))


def _markdown(data: bytes, name: str, encoding: str) -> Document:
    return markdown(decode(data, name, encoding))


def _html(data: bytes, name: str, encoding: str) -> Document:
    if b"\0" in data[:SNIFFED_BYTES] and not data.startswith(tuple(bom for bom, _ in BOMS)):
        raise DocumentError(f"{name!r} is binary, not HTML", hint="leave it out, or give a text of it")
    read: Callable[[bytes, str], Document] = import_module("agentmesh.rag.loaders.html").read
    return read(data, name)


def _pdf(data: bytes, name: str, encoding: str) -> Document:
    read: Callable[[bytes, str], Document] = import_module("agentmesh.rag.loaders.pdf").read
    return read(data, name)


def _csv(data: bytes, name: str, encoding: str) -> Document:
    """A row a part: `column: value` lines, and the columns as metadata."""
    text = decode(data, name, encoding)
    delimiter = "\t" if name.lower().endswith(".tsv") else _delimiter(text)
    try:
        rows = [r for r in csv.DictReader(io.StringIO(text), delimiter=delimiter, restkey="") if r]
    except csv.Error as e:
        raise DocumentError(f"{name!r} is not CSV: {e}") from None
    columns = [c for c in (rows[0] if rows else {}) if c]
    typed = {c: _column([r.get(c) or "" for r in rows]) for c in columns}

    def parts() -> Iterator[tuple[str, Mapping[str, Value]]]:
        for i, row in enumerate(rows):
            known = {c: v for c in columns if (v := typed[c][i]) is not None}
            yield "\n".join(f"{c}: {row[c]}" for c in columns if row.get(c)), {"row": i + 1, **known}

    return _joined(parts())


def _jsonl(data: bytes, name: str, encoding: str) -> Document:
    """A line a part; its text field is the text, its other plain fields are metadata."""

    def parts() -> Iterator[tuple[str, Mapping[str, Value]]]:
        for i, line in enumerate(decode(data, name, encoding).split("\n"), 1):
            if not line.strip():
                continue
            try:
                said = json.loads(line)
                json.dumps(said, ensure_ascii=False).encode()  # half a surrogate pair could not be stored
            except (ValueError, RecursionError):
                raise DocumentError(f"line {i} of {name!r} is not JSON: {line[:60]!r}") from None
            if isinstance(said, str):
                said = {"text": said}
            if not isinstance(said, dict):
                raise DocumentError(f"line {i} of {name!r} is not an object with a text field: {line[:60]!r}")
            field = next((f for f in TEXT_FIELDS if isinstance(said.get(f), str)), "")
            if not field:
                raise DocumentError(f"line {i} of {name!r} has none of the fields {', '.join(TEXT_FIELDS)}")
            text = str(said.pop(field)).replace("\r\n", "\n").replace("\r", "\n")
            yield text, {"line": i, **{k: v for k, v in said.items() if _is_scalar(v)}}

    return _joined(parts())


def _joined(parts: Iterator[tuple[str, Mapping[str, Value]]]) -> Document:
    out: list[str] = []
    found: list[Part] = []
    at = 0
    for text, metadata in parts:
        if text.strip():
            found.append(Part(at, metadata, alone=True))
            out.append(text + "\n\n")
            at += len(out[-1])
    return Document("".join(out), parts=tuple(found))


def _is_scalar(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(v, str) for v in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**63)


def _delimiter(text: str) -> str:
    try:
        return csv.Sniffer().sniff(text.split("\n", 1)[0] + "\n", delimiters=",;\t|").delimiter
    except csv.Error:
        return ","


def _column(values: list[str]) -> list[Value | None]:
    """One type a column, so that a filter compares like with like; an empty cell is absent; `007` stays text."""
    told = [v for v in values if v]
    if told and all(v.removeprefix("-").isdecimal() and str(int(v)) == v and len(v) < 18 for v in told):
        return [int(v) if v else None for v in values]
    try:
        if told and all(v.strip("-.0123456789") == "" and "." in v and not v.startswith("00") for v in told):
            return [float(v) if v else None for v in values]
    except ValueError:
        pass
    return [v or None for v in values]


_KINDS: dict[str, Callable[[bytes, str, str], Document]] = {
    ".txt": _text, ".text": _text, ".log": _text, ".rst": _text, ".adoc": _text, ".org": _text, ".tex": _text,
    ".py": _text, ".js": _text, ".ts": _text, ".java": _text, ".go": _text, ".rs": _text, ".c": _text, ".h": _text,
    ".cpp": _text, ".sh": _text, ".sql": _text, ".toml": _text, ".yaml": _text, ".yml": _text, ".json": _text,
    ".md": _markdown, ".markdown": _markdown, ".mdx": _markdown, ".html": _html, ".htm": _html, ".xhtml": _html,
    ".pdf": _pdf, ".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl,
}  # fmt: skip
