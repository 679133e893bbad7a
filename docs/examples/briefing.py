"""A briefing on a folder of text files: one Reader a file, all at once; a Writer joins their notes into a page.

agentmesh run docs/examples/briefing.py "What does it promise?"
BRIEFING_FOLDER=notes agentmesh run docs/examples/briefing.py "What was decided?" --model openai:gpt-5-mini
"""

import os
from pathlib import Path

from agentmesh import Agent, Context, Crew, Limits, RunFailedError
from agentmesh_agents import Page, Reader, Writer
from agentmesh_tools import in_folder

FOLDER = os.environ.get("BRIEFING_FOLDER") or str(Path(__file__).resolve().parent.parent)


class Briefing(Agent):
    """Answers a question from every text file of a folder."""

    folder: str = FOLDER
    pattern: str = "*.md"

    def flow(self, task: str, ctx: Context) -> str:
        """List, read side by side, write."""
        list_files, _ = in_folder(self.folder)
        paths = ctx.do(list_files.on(self.pattern))
        if not paths:
            raise RunFailedError(
                f"there is no file {self.pattern} in {self.folder}; set BRIEFING_FOLDER to a folder that has some"
            )
        reader = Reader(folder=self.folder, question=task)
        notes = ctx.gather(reader.on(path) for path in paths)
        page: Page = ctx.do(Writer(question=task).on(notes))
        return page.text


crew = Crew(Briefing(), Reader(), Writer(), limits=Limits(turns=1000))
