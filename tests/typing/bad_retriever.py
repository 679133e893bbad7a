"""The retriever: what a checker refuses."""

from agentmesh import Agent, Context, Retriever

papers = Retriever.open("papers")
search = papers.tool()


class Reader(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        search.on(5)  # error: arg-type reportArgumentType
        papers.search(task, mode="fuzzy")  # error: arg-type reportArgumentType
        agent, _ = papers.ingest("more")
        agent.on("a folder")  # error: arg-type reportArgumentType
        return ctx.do(search.on(task))  # error: return-value reportReturnType
