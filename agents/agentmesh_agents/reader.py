"""Reads one text file in pieces that fit the model, and notes what bears on a question."""

import re
from collections.abc import Iterator

from pydantic import BaseModel

from agentmesh import Agent, Context
from agentmesh.message import user
from agentmesh_tools import in_folder

SENTENCE = re.compile(r"[^.!?\n]{20,}[.!?]")


class Note(BaseModel):
    """What a Reader found in one file: one line a piece."""

    source: str
    lines: list[str]


class Reader(Agent[Note]):
    """Reads the file named in the task, piece by piece; its note has at least one line for each piece."""

    folder: str = "."
    question: str = ""
    piece_chars: int = 3000
    options = {"max_tokens": 40, "temperature": 0}
    instructions = "You take notes. You answer with one short sentence."

    def flow(self, task: str, ctx: Context) -> Note:
        """Every piece is read by a tool and noted by the model; a piece the model says nothing about speaks for itself."""
        _, read_file = in_folder(self.folder)
        lines: list[str] = []
        start, size = 0, 1
        while start < size:
            piece = ctx.do(read_file.on(task, start, self.piece_chars))
            start, size = piece.end, piece.size
            if piece.text.strip():
                lines.append(self._note(piece.text, ctx))
            if piece.end <= piece.start:
                break
        return Note(source=task, lines=lines or ["the file is empty"])

    def _note(self, text: str, ctx: Context) -> str:
        wish = f" that bears on: {self.question}" if self.question else ""
        asked = f"Write one sentence that says what this text tells{wish}\n\nText:\n{text}\n\nOne sentence:"
        said = first_line(ctx.do(self.ask([user(asked)], plain=True)).text)
        if not said:  # a small model may answer nothing: ask once more, then let the text speak
            said = first_line(ctx.do(self.ask([user(f"{text}\n\nSummarise this in one sentence.")], plain=True)).text)
        return said or f"(its own words) {first_sentence(text)}"


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def first_sentence(text: str) -> str:
    """The first sentence, or the first words of a text without one."""
    found = SENTENCE.search(text)
    return " ".join((found.group(0) if found else text[:120]).split())


def pieces(text: str, size: int) -> Iterator[str]:
    """The pieces a Reader of this size cuts a text into."""
    for start in range(0, len(text), size):
        yield text[start : start + size]
