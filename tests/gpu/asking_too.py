"""Another crew, whose queue `gpu` has the same model as that of `asking.py`."""

from agentmesh import Agent, Context, Crew, DeviceQueue, Queue


class Asking(Agent):
    """Asks once."""

    model = "local:tiny"
    options = {"max_tokens": 8}


class AskingMany(Agent[list[str]]):
    """Asks as often as it is told, all at once."""

    def flow(self, task: str, ctx: Context) -> list[str]:
        """An answer each."""
        return ctx.gather([Asking().on(t) for t in task.split()])


crew = Crew(AskingMany(), Asking(), name="asking-too", queues=[Queue("main"), DeviceQueue("gpu", model="tiny")])
