"""Splits a document into chunks at headings, paragraphs, sentences and words; each chunk is an exact slice of the text."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping

from agentmesh.errors import DefinitionError
from agentmesh.rag.documents import Chunk, Document, Heading, Part, Value

SIZE, OVERLAP = 1000, 150
# Where a chunk may end, best first: after a paragraph, line, sentence, clause, word. A match ends at the boundary.
BOUNDARIES = tuple(
    re.compile(p)
    for p in (r"\n[ \t]*\n+", r"\n", r"[.!?…][\"'”’»)\]]*\s+|[。！？；]+[”’」』）]*", r"[,;:–—]\s+|[，、：]", r"\s+")
)
NEAR_SIZE = 0.9  # with a measure other than characters, a chunk of this share of the size is large enough
MAX_BOUNDARY = 16  # characters of a boundary that may lie beyond the size
SMALL_SECTION = 4  # a section below 1/4 of the size shares a chunk with the next one


def split(
    document: Document, source: str, *, size: int = SIZE, overlap: int = OVERLAP,
    measure: Callable[[str], int] = len, metadata: Mapping[str, Value] | None = None,
) -> list[Chunk]:  # fmt: skip
    """The chunks of a document in the order of its text, with ids `source#start`.

    Each chunk's text is `document.text[start:end]`. A heading begins a new chunk unless the section before it is small.

    Args:
        source: the document's name, such as `docs/guide.md`.
        size: the largest measure of a chunk, at least 1.
        overlap: the most that a chunk repeats of the one before it in the same section; below `size`.
        measure: of a text: its characters, or its tokens by an embedder's `count`.
        metadata: of every chunk, in addition to that of the document and its parts.

    Raises:
        DefinitionError: `size` or `overlap` is out of bounds.
    """
    if size < 1 or not 0 <= overlap < size:
        raise DefinitionError(f"size {size}, overlap {overlap}: out of bounds", hint="choose 0 <= overlap < size")
    text, cutter = document.text, _Cutter(document.text, size, overlap, measure)
    headings, starts = _Headings(document), [p.start for p in document.parts]
    chunks: list[Chunk] = []
    for begin, end in _sections(document, size, measure):
        for a, b in cutter.cut(begin, end):
            part = document.parts[bisect_right(starts, a) - 1] if starts and starts[0] <= a else Part(0)
            merged = {**document.metadata, **part.metadata, **(metadata or {})}
            chunks.append(Chunk(f"{source}#{a}", text[a:b], source, a, headings.above(a, b), merged))
    return chunks


def _sections(document: Document, size: int, measure: Callable[[str], int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of stretches that no chunk crosses."""
    text = document.text
    hard_edges = {0, len(text)}  # a section ends here however small it is
    for i, part in enumerate(document.parts):
        if part.alone or (i and document.parts[i - 1].alone):
            hard_edges.add(part.start)
    edges = sorted(hard_edges | {h.start for h in document.headings})
    begin = 0
    for end in edges[1:]:
        small = end not in hard_edges and measure(text[begin:end]) < size // SMALL_SECTION
        if not small:
            yield begin, end
            begin = end


class _Headings:
    """Finds the headings above a stretch of text."""

    def __init__(self, document: Document) -> None:
        self._text, self._headings = document.text, document.headings
        self._starts = [h.start for h in document.headings]
        self._paths: list[tuple[str, ...]] = []
        above: list[Heading] = []
        for heading in document.headings:
            above = [*(h for h in above if h.level < heading.level), heading]
            self._paths.append(tuple(h.text for h in above))

    def above(self, a: int, b: int) -> tuple[str, ...]:
        """The headings above the first words of `text[a:b]` that are not a heading themselves, the outermost first."""
        i = bisect_right(self._starts, a) - 1
        while i + 1 < len(self._starts) and self._starts[i + 1] < b:
            body = max(a, self._headings[i].end) if i >= 0 else a
            if self._text[body : self._starts[i + 1]].strip():
                break
            i += 1
        return self._paths[i] if i >= 0 else ()


class _Cutter:
    """Cuts stretches of one text into slices of at most `size`."""

    def __init__(self, text: str, size: int, overlap: int, measure: Callable[[str], int]) -> None:
        self._text, self._size, self._overlap, self._measure = text, size, overlap, measure
        self._chars_per_unit = 4.0  # estimated from the text

    def cut(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Slices without white space at their ends, each as long as possible."""
        text, start, covered = self._text, begin, begin
        while True:
            while start < end and text[start].isspace():
                start += 1
            if start >= end:
                return
            limit = self._limit(start, end)
            stop = end if limit >= end else self._boundary(start, max(covered + 1, start + 1), limit, end)
            last = stop
            while last > start and text[last - 1].isspace():
                last -= 1
            if last > covered:
                yield start, last
            if stop >= end:
                return
            covered, start = stop, self._next_start(start, stop)

    def _limit(self, start: int, end: int) -> int:
        """The furthest end of a chunk from here; at least one character on."""
        if self._measure is len:
            return min(end, start + self._size)
        low, high, attempts = start + 1, end + 1, 0  # `low` fits, or is the minimum; `high` does not fit
        guess = min(end, start + max(1, int(self._size * self._chars_per_unit)))
        while True:
            n = self._measure(self._text[start:guess])
            low, high = (guess, high) if n <= self._size else (low, guess)
            if high - low <= 1 or NEAR_SIZE * self._size <= n <= self._size:
                return low
            self._chars_per_unit, attempts = (guess - start) / max(1, n), attempts + 1
            # guess by the text's density, which takes two or three measures; bisect where that does not converge
            guess = start + int(self._size * self._chars_per_unit * 0.95) if attempts < 5 else (low + high) // 2
            guess = max(low + 1, min(guess, high - 1))

    def _boundary(self, start: int, least: int, limit: int, end: int) -> int:
        """The last boundary of the best kind in the second half of the possible chunk, else the limit itself."""
        low = max(least, start + (limit - start) // 2)
        for boundary in BOUNDARIES:
            best = 0
            # the white space of a boundary is not part of the chunk, so it may lie beyond the limit
            for match in boundary.finditer(self._text, max(start, low - 2), min(end, limit + MAX_BOUNDARY)):
                if match.end() >= low and match.start() + len(match[0].rstrip()) <= limit:
                    best = match.end()
            if best:
                return best
        return max(limit, least)

    def _next_start(self, begin: int, stop: int) -> int:
        """Where the next chunk begins: at the first boundary within the overlap, or where this one ended."""
        if not self._overlap:
            return stop
        low = max(begin + 1, stop - self._overlap)
        if self._measure is not len:
            while low < stop and self._measure(self._text[low:stop]) > self._overlap:
                low += max(1, (stop - low) // 4)
        for boundary in BOUNDARIES[2:]:
            match = boundary.search(self._text, low, stop)
            if match and match.end() < stop:
                return match.end()
        # no boundary: a script without spaces is cut anywhere, but no chunk begins in the middle of a long word
        return low if not self._text[low:stop].isascii() else stop
