"""Agents and crews: what a checker refuses."""

from pydantic import BaseModel

from agentmesh import Agent, Context, Crew, run


class Order(BaseModel):
    id: int


class Verdict(BaseModel):
    good: bool


class Echo(Agent):
    pass


class Judge(Agent[Verdict]):
    strict: bool = False


class Clerk(Agent[Verdict, Order]):
    pass


class OtherTask(Agent[Verdict]):
    def flow(self, task: Order, ctx: Context) -> Verdict:  # error: override reportIncompatibleMethodOverride
        return Verdict(good=True)


class OtherOutput(Agent[Verdict]):
    def flow(self, task: str, ctx: Context) -> str:  # error: override reportIncompatibleMethodOverride
        return ctx.do(Echo().on(task))


class Desk(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        Echo().on(5)  # error: call-overload reportArgumentType
        Clerk().on("order 7")  # error: arg-type reportArgumentType
        Clerk().on()  # error: call-arg reportCallIssue
        ctx.do(Judge())  # error: arg-type reportArgumentType
        return ctx.do(Judge().on(task))  # error: return-value reportReturnType


Crew(Echo)  # error: arg-type reportArgumentType
lead: Agent[str, str] = Crew(Clerk()).lead  # error: assignment reportAssignmentType
crew: Crew[str] = Crew(Judge())  # error: arg-type reportAssignmentType
text: str = run(Judge(), "x")  # error: assignment reportAssignmentType
Judge(strict="very")  # error: arg-type reportArgumentType
Judge(string=True)  # error: call-arg reportCallIssue
