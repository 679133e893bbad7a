"""CSV and JSON lines: a row or a line is a part of the document, with its fields as metadata."""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from agentmesh.errors import DocumentError
from agentmesh.rag.documents import Document, Part, Value
from agentmesh.rag.loaders import decode

TEXT_FIELDS = ("text", "content", "body", "page_content")  # of a JSON line, the first that is there


def read_csv(data: bytes, name: str, encoding: str) -> Document:
    """A row a part: `column: value` lines, and the columns as metadata; see Loader."""
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
            values = {c: v for c in columns if (v := typed[c][i]) is not None}
            yield "\n".join(f"{c}: {row[c]}" for c in columns if row.get(c)), {"row": i + 1, **values}

    return _joined(parts())


def read_json_lines(data: bytes, name: str, encoding: str) -> Document:
    """A line a part; its text field is the text, its other plain fields are metadata; see Loader."""

    def parts() -> Iterator[tuple[str, Mapping[str, Value]]]:
        for i, line in enumerate(decode(data, name, encoding).split("\n"), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be stored
            except (ValueError, RecursionError):
                raise DocumentError(f"line {i} of {name!r} is not JSON: {line[:60]!r}") from None
            if isinstance(value, str):
                value = {"text": value}
            if not isinstance(value, dict):
                raise DocumentError(f"line {i} of {name!r} is not an object with a text field: {line[:60]!r}")
            field = next((f for f in TEXT_FIELDS if isinstance(value.get(f), str)), "")
            if not field:
                raise DocumentError(f"line {i} of {name!r} has none of the fields {', '.join(TEXT_FIELDS)}")
            text = str(value.pop(field)).replace("\r\n", "\n").replace("\r", "\n")
            yield text, {"line": i, **{k: v for k, v in value.items() if _is_scalar(v)}}

    return _joined(parts())


def _joined(parts: Iterator[tuple[str, Mapping[str, Value]]]) -> Document:
    out: list[str] = []
    places: list[Part] = []
    at = 0
    for text, metadata in parts:
        if text.strip():
            places.append(Part(at, metadata, alone=True))
            out.append(text + "\n\n")
            at += len(out[-1])
    return Document("".join(out), parts=tuple(places))


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
    filled = [v for v in values if v]
    if filled and all(v.removeprefix("-").isdecimal() and str(int(v)) == v and len(v) < 18 for v in filled):
        return [int(v) if v else None for v in values]
    try:
        if filled and all(v.strip("-.0123456789") == "" and "." in v and not v.startswith("00") for v in filled):
            return [float(v) if v else None for v in values]
    except ValueError:
        pass
    return [v or None for v in values]
