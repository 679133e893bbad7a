"""What a checker refuses of runs, on both faces."""

from agentmesh import Agent, Mesh, Retriever


class Echo(Agent):
    """Text in, text out."""


async def program(mesh: Mesh, papers: Retriever) -> None:
    await mesh.start(Echo(), "x")  # error: misc reportGeneralTypeIssues
    mesh.start(Echo(), "x", id="r")  # error: call-arg reportCallIssue
    mesh.run(Echo(), "x", colour="red")  # error: call-arg reportCallIssue
    mesh.get("r").status.upper()  # error: attr-defined reportAttributeAccessIssue
    papers.add("folder", sise=500)  # error: call-arg reportCallIssue
