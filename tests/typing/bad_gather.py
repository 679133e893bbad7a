"""Gathers: what a checker refuses."""

from agentmesh import Agent, Context, tool
from agentmesh.definitions.step import Step


@tool
def text(of: str) -> str:
    return of


@tool
async def size(of: str) -> int:
    return len(of)


class Desk(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        a, b, c = ctx.gather((text.on(task), size.on(task)))  # error: misc reportAssignmentType
        ctx.gather([text])  # error: arg-type reportArgumentType
        ctx.gather([text.on(task)], need=1, errors=True)  # error: call-overload reportCallIssue
        ctx.gather([text.on(task)], deadline_s="5")  # error: call-overload reportArgumentType
        (first, _) = ctx.gather((size.on(task), text.on(task)), errors=True)
        count: int = first  # error: assignment reportAssignmentType
        both: list[str] = ctx.gather([text.on(task)], errors=True)  # error: assignment reportAssignmentType
        return f"{a}{b}{c}{count}{both}"


def narrow(step: Step[object]) -> Step[str]:
    return step  # error: return-value reportReturnType
