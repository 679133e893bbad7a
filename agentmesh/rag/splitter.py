"""From a document to chunks: cut where the text itself pauses, never longer than asked, each true to its place."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping

from agentmesh.errors import DefinitionError
from agentmesh.rag.documents import Chunk, Document, Heading, Part, Value

SIZE, OVERLAP = 1000, 150
# where a text pauses, the best first: paragraph, line, sentence, clause, word. Each match ends where a chunk may end.
PAUSES = tuple(
    re.compile(p)
    for p in (r"\n[ \t]*\n+", r"\n", r"[.!?…][\"'”’»)\]]*\s+|[。！？；]+[”’」』）]*", r"[,;:–—]\s+|[，、：]", r"\s+")
)
NEAR = 0.9  # of the size is near enough for a measure other than characters
LONGEST_PAUSE = 16  # characters
SMALL = 4  # a section below a fourth of the size shares a chunk with the next


def split(
    document: Document, source: str, *, size: int = SIZE, overlap: int = OVERLAP,
    measure: Callable[[str], int] = len, metadata: Mapping[str, Value] | None = None,
) -> list[Chunk]:  # fmt: skip
    """Chunks in the order of the text, with ids `source#start`.

    Each chunk's text is `document.text[start:end]`. A new section begins a new chunk, unless what stands before is small.

    Args:
        source: what the document is called, e.g. `docs/guide.md`.
        size: the most a chunk measures, at least 1.
        overlap: the most that a chunk repeats of the one before it, within one section; below `size`.
        measure: how long a text is: characters, or tokens by an embedder's `count`.
        metadata: for every chunk, beside that of the document and its parts.
    """
    if size < 1 or not 0 <= overlap < size:
        raise DefinitionError(f"size {size} and overlap {overlap} do not fit: 0 <= overlap < size, and size at least 1")
    text, cutter = document.text, _Cutter(document.text, size, overlap, measure)
    paths, starts = _Paths(document), [p.start for p in document.parts]
    chunks: list[Chunk] = []
    for begin, end in _sections(document, size, measure):
        for a, b in cutter.cut(begin, end):
            part = document.parts[bisect_right(starts, a) - 1] if starts and starts[0] <= a else Part(0)
            told = {**document.metadata, **part.metadata, **(metadata or {})}
            chunks.append(Chunk(f"{source}#{a}", text[a:b], source, a, paths.above(a, b), told))
    return chunks


def _sections(document: Document, size: int, measure: Callable[[str], int]) -> Iterator[tuple[int, int]]:
    text = document.text
    # a part that stands alone closes what stands before and opens its own; the next part's start closes that
    hard = {0, len(text)}
    for i, part in enumerate(document.parts):
        if part.alone or (i and document.parts[i - 1].alone):
            hard.add(part.start)
    edges = sorted(hard | {h.start for h in document.headings})
    begin = 0
    for end in edges[1:]:
        small = end not in hard and measure(text[begin:end]) < size // SMALL
        if not small:
            yield begin, end
            begin = end


class _Paths:
    """The titles above a stretch of text."""

    def __init__(self, document: Document) -> None:
        self._text, self._headings = document.text, document.headings
        self._starts = [h.start for h in document.headings]
        self._paths: list[tuple[str, ...]] = []
        above: list[Heading] = []
        for heading in document.headings:
            above = [*(h for h in above if h.level < heading.level), heading]
            self._paths.append(tuple(h.text for h in above))

    def above(self, a: int, b: int) -> tuple[str, ...]:
        """Those of the first words in `text[a:b]` that are no title themselves."""
        i = bisect_right(self._starts, a) - 1
        while i + 1 < len(self._starts) and self._starts[i + 1] < b:
            words = max(a, self._headings[i].end) if i >= 0 else a
            if self._text[words : self._starts[i + 1]].strip():
                break
            i += 1
        return self._paths[i] if i >= 0 else ()


class _Cutter:
    """Cuts a stretch of one text."""

    def __init__(self, text: str, size: int, overlap: int, measure: Callable[[str], int]) -> None:
        self._text, self._size, self._overlap, self._measure = text, size, overlap, measure
        self._per_unit = 4.0  # characters; learnt from the text

    def cut(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Stretches without white space at their ends, each as long as may be."""
        text, at, done = self._text, begin, begin
        while True:
            while at < end and text[at].isspace():
                at += 1
            if at >= end:
                return
            reach = self._reach(at, end)
            stop = end if reach >= end else self._pause(at, max(done + 1, at + 1), reach, end)
            last = stop
            while last > at and text[last - 1].isspace():
                last -= 1
            if last > done:
                yield at, last
            if stop >= end:
                return
            done, at = stop, self._back(at, stop)

    def _reach(self, at: int, end: int) -> int:
        """The furthest a chunk from here may go; at least one character."""
        if self._measure is len:
            return min(end, at + self._size)
        low, high, tried = at + 1, end + 1, 0  # `low` fits, or is the least there is; `high` does not
        guess = min(end, at + max(1, int(self._size * self._per_unit)))
        while True:
            n = self._measure(self._text[at:guess])
            low, high = (guess, high) if n <= self._size else (low, guess)
            if high - low <= 1 or NEAR * self._size <= n <= self._size:
                return low
            self._per_unit, tried = (guess - at) / max(1, n), tried + 1
            # first by how dense the text is, which takes two or three measures; by halves where that leads nowhere
            guess = at + int(self._size * self._per_unit * 0.95) if tried < 5 else (low + high) // 2
            guess = max(low + 1, min(guess, high - 1))

    def _pause(self, at: int, least: int, reach: int, end: int) -> int:
        """The last of the best pauses in the second half of what may be taken, else the reach itself."""
        low = max(least, at + (reach - at) // 2)
        for pause in PAUSES:
            best = 0
            # the white space of a pause is not part of the chunk, so it may lie beyond its reach
            for found in pause.finditer(self._text, max(at, low - 2), min(end, reach + LONGEST_PAUSE)):
                if found.end() >= low and found.start() + len(found[0].rstrip()) <= reach:
                    best = found.end()
            if best:
                return best
        return max(reach, least)

    def _back(self, begin: int, stop: int) -> int:
        """Where the next chunk begins: the first pause within the overlap, or where this one ended."""
        if not self._overlap:
            return stop
        low = max(begin + 1, stop - self._overlap)
        if self._measure is not len:
            while low < stop and self._measure(self._text[low:stop]) > self._overlap:
                low += max(1, (stop - low) // 4)
        for pause in PAUSES[2:]:
            found = pause.search(self._text, low, stop)
            if found and found.end() < stop:
                return found.end()
        # no pause at all: a script without spaces is cut anywhere, but a long word is not begun in its middle
        return low if not self._text[low:stop].isascii() else stop
