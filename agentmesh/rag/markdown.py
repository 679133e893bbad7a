"""Markdown as it stands, with its headings found: `# so`, and underlined; never inside a fence."""

import re
from collections.abc import Iterator

from agentmesh.rag.chunk import Document, Heading

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
            yield Heading(at, len(found[1]), _plain(found[2] or ""), at + len(line))
            before = ""
        elif before and (found := _UNDERLINE.match(line)):
            yield Heading(before_at, 1 if found[1][0] == "=" else 2, _plain(before), at + len(line))
            before = ""
        else:
            # only a paragraph of one line is taken for a title
            alone = not before and not _NO_TITLE.match(line) and text[max(0, at - 2) : at] in ("", "\n", "\n\n")
            before, before_at = (line.strip(), at) if alone else ("", at)
        at += len(line) + 1


def _plain(title: str) -> str:
    return _MARKUP.sub(lambda m: m[1] or m[2] or "", title).strip()
