"""A user's project with a Celery app of its own: tasks, a result backend, and a crew that runs on the same app."""

import os
import signal
import time

from celery import Celery

from agentmesh import Agent, Context, Crew, Queue, Schedule, tool
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.testing import ScriptedModel, says

app = Celery("theirs", broker=os.environ["THEIR_BROKER"], backend=os.environ["THEIR_BACKEND"], set_as_current=False)
app.conf.broker_transport_options = {
    "visibility_timeout": float(os.environ.get("THEIR_VISIBILITY_S", "3600")),
    "unacked_restore_interval": 1,
}
app.conf.broker_connection_retry_on_startup = True
app.conf.worker_proc_alive_timeout = 10.0


@app.task(shared=False, name="theirs.shout")
def shout(word: str) -> str:
    """Theirs."""
    return word.upper()


@app.task(shared=False, name="theirs.join")
def join(words: list[str]) -> str:
    """Theirs."""
    return " + ".join(words)


def note(line: str) -> None:
    """One line into the file that the test reads."""
    with open(os.environ["THEIR_LOG"], "a") as log:
        log.write(f"{line} {os.getpid()}\n")


@tool
def work(name: str, seconds: float) -> str:
    """Takes its time."""
    note(name)
    time.sleep(seconds)
    return name


@tool
def die_once(name: str) -> str:
    """Kills its process the first time."""
    note(name)
    with open(os.environ["THEIR_LOG"]) as log:
        if log.read().count(f"{name} ") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return name


class Echo(Agent):
    """Says what it is told."""


class Failing(Agent):
    """Fails."""

    def flow(self, task: str, ctx: Context) -> str:
        raise ValueError(f"not {task}")


class Team(Agent):
    """Four calls side by side, then a question."""

    def flow(self, task: str, ctx: Context) -> str:
        names = ctx.gather([work.on(f"{task}{i}", 0.3) for i in range(4)])
        return ctx.do(Echo().on(",".join(names)))


class Long(Agent):
    """One call that outlasts its lease."""

    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(work.on(task, 2.5))


class Dying(Agent):
    """One call whose process dies."""

    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(die_once.on(task))


crew = Crew(
    Team(), Echo(), Failing(), Long(), Dying(), name="inside", queues=[Queue("main")],
    schedules=[Schedule(1.0, Echo(), "tick", name="tick")], model=ScriptedModel(lambda p: says(f"<{p.messages[-1].text}>")),
)  # fmt: skip
mesh = Mesh(crew, app=app, journal=os.environ["THEIR_JOURNAL"], config=Config(lease_s=1.0, sweep_s=0.2))
