"""Tools: what a checker refuses; see test_typing.py for the marks."""

from agentmesh import Agent, Context, Tool, tool


@tool
def price(item: str, count: int = 1) -> float:
    return 4.5 * count


@tool(timeout_s=20)
async def wind(city: str) -> list[int]:
    return [3]


@tool(timeout_s="20")  # error: call-overload reportArgumentType
def slow(item: str) -> int:
    return 1


@tool(timeout=20)  # error: call-overload reportCallIssue
def late(item: str) -> int:
    return 1


class Desk(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        price.on(5)  # error: arg-type reportArgumentType
        price.on()  # error: call-arg reportCallIssue
        price.on(task, many=2)  # error: call-arg reportCallIssue
        wind.on(b"Lima")  # error: arg-type reportArgumentType
        ctx.do(price)  # error: arg-type reportArgumentType
        text: str = ctx.do(price.on(task))  # error: assignment reportAssignmentType
        sky: int = ctx.do(wind.on(task))  # error: assignment reportAssignmentType
        return text * sky


Tool.from_schema("a", {}, price, retry=1)  # error: call-overload reportCallIssue
text: Tool[[str], str] = wind  # error: assignment reportAssignmentType
