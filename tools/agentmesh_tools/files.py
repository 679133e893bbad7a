"""Reading text files below one folder, and nothing outside it."""

import difflib
import os
from pathlib import Path

from pydantic import BaseModel

from agentmesh import Tool, TryAgain, tool

MAX_CHARS = 20_000  # in one piece
MAX_FILES = 1000


class Piece(BaseModel):
    """A part of a text file, in characters: `text` is `[start:end]` of `size`."""

    path: str
    text: str
    start: int
    end: int
    size: int


def in_folder(root: str | Path) -> tuple[Tool[[str], list[str]], Tool[[str, int, int], Piece]]:
    """`list_files` and `read_file` for one folder; a path that leads out of it, by `..` or a link, is refused.

    Args:
        root: the folder; it need not exist before the tools are called.
    """
    folder = Path(root)

    @tool
    def list_files(pattern: str = "**/*") -> list[str]:
        """The text files that match a pattern, sorted, as paths relative to the folder.

        Args:
            pattern: such as `*.md` or `**/*.txt`.
        """
        if pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
            raise TryAgain(f"pattern {pattern!r} must stay inside the folder: no `..`, no absolute path")
        top = folder.resolve()
        paths = sorted(
            p for p in folder.glob(pattern) if p.is_file() and p.resolve().is_relative_to(top) and _is_text(p)
        )
        return [p.relative_to(folder).as_posix() for p in paths[:MAX_FILES]]

    @tool
    def read_file(path: str, start: int = 0, length: int = 4000) -> Piece:
        """A piece of a text file.

        Args:
            path: relative to the folder, as list_files gives it.
            start: the first character.
            length: how many characters, at most 20000.
        """
        text = _inside(folder, path).read_text(encoding="utf-8", errors="replace")
        start = max(0, start)
        end = min(len(text), start + max(1, min(length, MAX_CHARS)))
        return Piece(path=path, text=text[start:end], start=start, end=end, size=len(text))

    return list_files, read_file


def _inside(folder: Path, path: str) -> Path:
    """The file of a path.

    Raises:
        TryAgain: it leads out of the folder, or is not a text file in it.
    """
    top = os.path.realpath(folder)
    real = os.path.realpath(folder / path)
    if os.path.commonpath([top, real]) != top:
        raise TryAgain(f"path {path!r} leads out of the folder; use a path that list_files gives")
    file = Path(real)
    if not file.is_file():
        paths = [p.relative_to(top).as_posix() for p in Path(top).rglob("*") if p.is_file()][:MAX_FILES]
        near = difflib.get_close_matches(path, paths, n=3)
        raise TryAgain(f"there is no file {path!r}" + (f"; near it are {', '.join(near)}" if near else ""))
    if not _is_text(file):
        raise TryAgain(f"file {path!r} is not text")
    return file


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(2048)
