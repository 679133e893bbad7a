"""Reads one text file in pieces that fit the model, and notes what answers a question."""

import re
from collections.abc import Iterator

from pydantic import BaseModel

from agentmesh import Agent, Context
from agentmesh.message import user
from agentmesh_tools import in_folder

SENTENCE = re.compile(r"[^.!?\n]{20,}[.!?]")


class Note(BaseModel):
    """What a Reader noted of one file: one line for each piece."""

    source: str
    lines: list[str]


class Reader(Agent[Note]):
    """Reads the file that the task names, piece by piece; its note has at least one line for each piece."""

    folder: str = "."
    question: str = ""
    piece_chars: int = 3000
    options = {"max_tokens": 40, "temperature": 0}
    instructions = "You take notes. You answer with one short sentence."

    def flow(self, task: str, ctx: Context) -> Note:
        """A tool reads each piece, and the model writes a line about it; where it writes nothing, the first sentence is taken."""
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
        request = f"Write one sentence that says what this text tells{wish}\n\nText:\n{text}\n\nOne sentence:"
        line = first_line(ctx.do(self.ask([user(request)], plain=True)).text)
        if not line:  # a small model may answer nothing: ask once more, then take the text's first sentence
            line = first_line(ctx.do(self.ask([user(f"{text}\n\nSummarise this in one sentence.")], plain=True)).text)
        return line or f"(its own words) {first_sentence(text)}"


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def first_sentence(text: str) -> str:
    """The first sentence, or the first words of a text without one."""
    match = SENTENCE.search(text)
    return " ".join((match.group(0) if match else text[:120]).split())


def pieces(text: str, size: int) -> Iterator[str]:
    """The pieces a Reader of this size cuts a text into."""
    for start in range(0, len(text), size):
        yield text[start : start + size]
