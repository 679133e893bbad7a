"""Joins notes into one page; code lists the sources, so that none is forgotten and none invented."""

from pydantic import BaseModel

from agentmesh import Agent, Context
from agentmesh.message import user
from agentmesh_agents.reader import Note, first_line


class Page(BaseModel):
    """A page in Markdown, and the sources it was written from."""

    text: str
    sources: list[str]


class Writer(Agent[Page, list[Note]]):
    """Writes a page that answers a question from notes."""

    question: str = ""
    group_chars: int = 2400
    options = {"max_tokens": 120, "temperature": 0}
    instructions = "You write clear, short English. You use only what the notes say."

    def flow(self, task: list[Note], ctx: Context) -> Page:
        """A paragraph for each group of notes that fits the model, side by side; then the notes themselves, cited."""
        groups = _groups(task, self.group_chars)
        asks = [self.ask([user(self._request(group))], plain=True) for group in groups]
        paragraphs = [first_paragraph(reply.text) for reply in ctx.gather(asks)]
        parts = [f"# {self.question or 'Briefing'}", *[p for p in paragraphs if p], "## What each source says"]
        parts += [f"- **{note.source}**: {' '.join(note.lines)}" for note in task]
        parts += ["## Sources", "\n".join(f"{i}. {note.source}" for i, note in enumerate(task, 1))]
        return Page(text="\n\n".join(parts), sources=[note.source for note in task])

    def _request(self, notes: list[Note]) -> str:
        lines = "\n".join(f"- {' '.join(note.lines)}" for note in notes)
        return f"Notes:\n{lines}\n\nWrite one short paragraph from these notes" + (
            f" that answers: {self.question}" if self.question else "."
        )


def first_paragraph(text: str) -> str:
    """The text up to its first empty line."""
    return text.strip().partition("\n\n")[0] if first_line(text) else ""


def _groups(notes: list[Note], most_chars: int) -> list[list[Note]]:
    groups: list[list[Note]] = []
    used = most_chars
    for note in notes:
        size = sum(len(line) + 1 for line in note.lines)
        if not groups or used + size > most_chars:
            groups.append([])
            used = 0
        groups[-1].append(note)
        used += size
    return groups
