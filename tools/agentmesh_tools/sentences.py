"""The sentences of plain text and Markdown, each with its place; and the other lines: rows, headings, code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePath

MAX_BYTES = 1200  # of a sentence; a text without punctuation that is known here is split at its lines
# files of these kinds are split at their lines
BY_LINES = {".c", ".cpp", ".csv", ".go", ".h", ".java", ".js", ".json", ".log", ".py", ".rs", ".sh", ".sql", ".toml", ".ts",
            ".tsv", ".yaml", ".yml"}  # fmt: skip
BLANK = re.compile(r"[ \t>]*$")
FENCE = re.compile(r"[ \t>]*(?:`{3,}(?!.*`)|~{3,})[ \t]*(.*)")
ROW = re.compile(r"[ \t>]*\|")
UNDER_ROW = re.compile(r"[ \t>]*\|?[ \t]*:?-[-:| \t]*$")
HEADING = re.compile(r" {0,3}#{1,6}[ \t]")
UNDERLINE = re.compile(r" {0,3}(?:=+|-+|~{3,}|\^{3,})[ \t]*$")
RULE = re.compile(r"[ \t]*(?:=+|-+|(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,}|\^{3,}|<!--.*)[ \t]*$")
ITEM = re.compile(r"[ \t>]*(?:[-*+•]|\d{1,3}[.)])[ \t]+")
QUOTED = re.compile(r"[ \t]*>[ \t>]*")
INDENTED = re.compile(r"(?: {4}|\t)")
END = re.compile(r"[.!?…]+[\"'”’»)\]*_`]*(?=\s|$)|[。！？।؟]+[”’」』）]*")
CONTINUES = re.compile(  # a full stop after these ends nothing; after those below only where a sentence may continue
    r"(?:(?<![\w.])(?:[A-Za-z]\.)+|\b(?:cf|vs|Mr|Mrs|Ms|Dr|Prof|St|Fig|fig|Eq|eq|Sec|sec|approx|ca)\.|"
    r"\b(?:etc|Inc|Ltd|Co|Corp|No|no|pp?)\.(?=\s+[\da-z]))"
)


@dataclass(frozen=True, slots=True)
class Span:
    """`text[start:end]`; `prose` says that it is a whole sentence, not a row, a heading, a line of code or a part of one."""

    start: int
    end: int
    prose: bool = True


def spans(text: str, *, source: str = "", torn: bool = False) -> Iterator[Span]:
    """The sentences and other lines of a passage, in their order, without their marks of Markdown.

    The wrapped lines of a paragraph belong together. A blank line, a list item, a heading, a row or a fence ends it.

    Args:
        source: the document's name; its ending says whether it is code.
        torn: the passage begins inside a document, perhaps inside a sentence.
    """
    if PurePath(source).suffix.lower() in BY_LINES:
        yield from _lines(text, 0, len(text))
        return
    for start, end, prose in _blocks(text, torn):
        if not prose:
            yield from _lines(text, start, end)
            continue
        wrapped = "\n" in text[start:end]
        for a, b in _sentences(text, start, end):
            begins = not (torn and a == 0 and text[0].islower())
            ends = not (wrapped and b == len(text)) or any(m.end() == b for m in END.finditer(text, a))
            if len(text[a:b].encode()) > MAX_BYTES:
                yield from _lines(text, a, b)
            else:
                yield Span(a, b, begins and ends)


def _blocks(text: str, torn: bool) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether it is prose) of paragraphs and list items, and of each line that is neither."""
    start, at, listed = -1, 0, False  # `start` is -1 between blocks
    fenced = _begins_fenced(text) if torn else False
    for line, below in pairwise([*text.split("\n"), ""]):
        end = at + len(line)
        item, fence, blank = ITEM.match(line), FENCE.match(line), BLANK.match(line)
        code = fenced or (start < 0 and not listed and INDENTED.match(line) and not blank)
        alone = bool(fence or code or blank or ROW.match(line) or HEADING.match(line) or RULE.match(line))
        title = start >= 0 and UNDERLINE.match(line) and "\n" not in text[start : at - 1]
        if start >= 0 and (alone or item):
            yield start, at - 1, not title
            start = -1
        if fence and not title and not (fenced and fence[1]):  # `~~~` under a line makes that a title
            fenced = not fenced
        elif alone:
            if not blank and not (ROW.match(line) and UNDER_ROW.match(below)):  # nor the names of columns
                yield at, end, False
        elif start < 0:
            quoted = item or QUOTED.match(line)
            start = quoted.end() + at if quoted else at
        if item or not (blank or line[0].isspace()):
            listed = bool(item)
        at = end + 1
    if start >= 0:
        yield start, len(text), True


def _begins_fenced(text: str) -> bool:
    """Whether a passage begins inside a fence: its first one has no language, and is not closed by one like it."""
    fences = [m[1] for line in text.split("\n") if (m := FENCE.match(line)) and "`" in m[0]]
    return bool(fences) and not fences[0] and (len(fences) == 1 or bool(fences[1]))


def _sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(start, end) of a paragraph's sentences, without white space at their ends."""
    for match in END.finditer(text, start, end):
        stop = text.find(".", match.start(), match.end()) + 1
        if any(m.end() == stop for m in CONTINUES.finditer(text, max(start, match.start() - 8), end)):
            continue
        yield from _trimmed(text, start, match.end())
        start = match.end()
    yield from _trimmed(text, start, end)


def _lines(text: str, start: int, end: int) -> Iterator[Span]:
    for line in re.compile(r"[^\n]*\w[^\n]*").finditer(text, start, end):
        yield from (Span(a, b, False) for a, b in _trimmed(text, line.start(), line.end(), " \t#>|"))


def _trimmed(text: str, start: int, end: int, marks: str | None = None) -> Iterator[tuple[int, int]]:
    trimmed = text[start:end].strip(marks)
    if trimmed:
        start = text.index(trimmed, start)
        yield start, start + len(trimmed)


def one_line(text: str) -> str:
    """A sentence without the line ends of its document, nor what begins the lines of a quotation in Markdown.

    >>> one_line("It is\\n> so.")
    'It is so.'
    """
    return " ".join(re.sub(r"\n[ \t>]*", " ", text).split())
