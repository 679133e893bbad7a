"""The retriever and its tool."""

from typing import assert_type

from agentmesh import Agent, Context, Retriever, Run
from agentmesh.rag.documents import Hit
from agentmesh.rag.ingest import Added
from agentmesh.rag.search import Passage

papers = Retriever.open("papers")
search = papers.tool(k=3, about="papers")


class Reader(Agent[list[Passage]]):
    tools = (search,)

    def flow(self, task: str, ctx: Context) -> list[Passage]:
        found = ctx.do(search.on(task))
        assert_type(found, list[Passage])
        agent, request = papers.ingest("more")
        assert_type(ctx.do(agent.on(request)), Added)
        return found


def outside() -> None:
    assert_type(papers.search("q"), list[Hit])
    assert_type(papers.add("folder"), Added)
    assert_type(papers.start_adding("folder"), Run[Added])
