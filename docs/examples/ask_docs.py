"""Questions to a folder of documents: what is new in it is indexed first, then a Librarian answers with quotes.

agentmesh run docs/examples/ask_docs.py "What happens to a run when a worker dies?"
ASK_DOCS_FOLDER=notes agentmesh run docs/examples/ask_docs.py "What was decided?" --model openai:gpt-5-mini
"""

import os
from pathlib import Path

from agentmesh import Agent, Context, Crew
from agentmesh.rag.ingest import Ingest
from agentmesh.retriever import Retriever
from agentmesh_agents import Librarian

FOLDER = os.environ.get("ASK_DOCS_FOLDER") or str(Path(__file__).resolve().parent.parent)
STORE = os.environ.get("ASK_DOCS_STORE", ".agentmesh/ask_docs")

documents = Retriever.open(STORE)


class AskDocs(Agent):
    """Answers a question from the documents of a folder."""

    folder: str = FOLDER
    pattern: str = "*.md"

    def flow(self, task: str, ctx: Context) -> str:
        """Index what is new or changed, then ask."""
        ingest, asked = documents.ingest(self.folder, glob=self.pattern)
        ctx.do(ingest.on(asked))
        return ctx.do(Librarian(store=documents.path).on(task)).page()


crew = Crew(AskDocs(), Ingest(), Librarian())
