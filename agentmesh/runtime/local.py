"""`run()` and `start()`: a mesh and a worker thread in this process, over an embedded Valkey where no broker is named."""

import atexit
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.step import RUNNING_INSIDE
from agentmesh.engine.run import Run
from agentmesh.errors import MeshError
from agentmesh.message import Message
from agentmesh.runtime.bootstrap import check_models, make_mesh

if TYPE_CHECKING:
    from agentmesh.celery.embedded import InProcessWorker
    from agentmesh.mesh import Mesh
    from agentmesh.runtime.valkey import EmbeddedValkey

Out = TypeVar("Out")


class _LocalRuntime:
    """What `run()` and `start()` keep up in this process: one mesh and worker a crew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Mesh, InProcessWorker, EmbeddedValkey | None]] = {}
        self._pid = os.getpid()

    def mesh(self, agent: "Agent[Any, Any] | Crew") -> "Mesh":
        from agentmesh.config import load

        crew = agent if isinstance(agent, Crew) else Crew(agent, extensible=True)
        with self._lock:
            if self._pid != os.getpid():  # a fork has neither our threads nor our sockets
                self._open, self._pid = {}, os.getpid()
            if crew.name in self._open:
                mesh = self._open[crew.name][0]
                mesh.crew._absorb(crew)
                return mesh
            config = load()
            check_models(crew, config)
            mesh, valkey = make_mesh(crew, config)
            worker = mesh.worker().start()
            if not self._open:
                atexit.register(self.close)
            self._open[crew.name] = mesh, worker, valkey
            return mesh

    def close(self) -> None:
        """Stop the workers and leave the embedded Valkey; open runs stay resumable."""
        with self._lock:
            for mesh, worker, valkey in self._open.values():
                worker.stop()
                mesh.close()
                if valkey is not None:
                    valkey.leave()
            self._open.clear()
            atexit.unregister(self.close)


_RUNTIME = _LocalRuntime()


def start(
    agent: "Agent[Out, Any] | Crew",
    task: Any = "",
    *,
    id: str = "",
    history: Sequence[Message] = (),
    stream: bool = True,
) -> Run[Out]:
    """Begin a run and come back at once with its handle; a script or notebook needs nothing else.

    Args:
        agent: an agent, or a Crew whose first agent leads.
        id: of the run; the same id with the same task answers the run that is there.
        history: messages to put before the task: `other_run.messages`.
        stream: whether `run.tokens()` has something to give.

    Raises:
        MeshError: called inside a flow or a tool.
        ConfigError: a broker, model, key or package is missing.
    """
    _refuse_inside_step("start")
    mesh = _RUNTIME.mesh(agent)
    lead = agent.lead if isinstance(agent, Crew) else agent
    return mesh.start(lead, task, id=id, history=history, stream=stream)


def run(
    agent: "Agent[Out, Any] | Crew",
    task: Any = "",
    *,
    id: str = "",
    history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Out:
    """The agent's answer: `start` and its result.

    Raises:
        RunError: the run ended without a value.
        TimeoutError: it has not ended in `timeout_s`; it can be taken up again under its id.
    """
    _refuse_inside_step("run")
    handle: Run[Out] = start(agent, task, id=id, history=history, stream=False)
    return handle.result(timeout_s=timeout_s)


def stop() -> None:
    """Stop what `run` and `start` keep up in this process."""
    _RUNTIME.close()


def _refuse_inside_step(verb: str) -> None:
    inside = RUNNING_INSIDE.get()
    if inside:
        mend = "write `ctx.do(Researcher().on(task))`" if "flow" in inside else "call it from an agent's flow as a step"
        raise MeshError(f"`{verb}()` inside {inside} would block a worker while it waits: {mend}")
