"""`run()` and `start()`: a mesh and a worker thread in this process, over an embedded Valkey where no broker is named."""

import atexit
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.engine.blocking import refuse_inside_step, refuse_on_event_loop
from agentmesh.engine.run import Run
from agentmesh.message import Message
from agentmesh.runtime.bootstrap import check_models, make_mesh

if TYPE_CHECKING:
    from agentmesh.celery.embedded import InProcessWorker
    from agentmesh.mesh import Mesh
    from agentmesh.runtime.valkey import EmbeddedValkey

Out = TypeVar("Out")


class _LocalRuntime:
    """What `run()` and `start()` keep running in this process: a mesh and a worker for each crew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Mesh, InProcessWorker, EmbeddedValkey | None]] = {}
        self._pid = os.getpid()

    def mesh(self, crew: Crew) -> "Mesh":
        from agentmesh.config import load_config

        with self._lock:
            if self._pid != os.getpid():  # a fork has neither our threads nor our sockets
                self._open, self._pid = {}, os.getpid()
            if crew.name in self._open:
                mesh = self._open[crew.name][0]
                mesh.crew._absorb(crew)
                return mesh
            config = load_config()
            check_models(crew, config)
            mesh, valkey = make_mesh(crew, config)
            worker = mesh.worker().start()
            if not self._open:
                atexit.register(self.close)
            self._open[crew.name] = mesh, worker, valkey
            return mesh

    def close(self) -> None:
        """Stop the workers and leave the embedded Valkey; open runs can be resumed."""
        with self._lock:
            for mesh, worker, valkey in self._open.values():
                worker.stop()
                mesh.close()
                if valkey is not None:
                    valkey.leave()
            self._open.clear()
            atexit.unregister(self.close)


_RUNTIME = _LocalRuntime()


def local_crew(agent: Agent[Any, Any] | Crew) -> Crew:
    """The crew that `run` and `start` carry this agent in; named after the caller's file."""
    return agent if isinstance(agent, Crew) else Crew(agent, extensible=True)


def local_mesh(crew: Crew) -> "Mesh":
    """This process's mesh for a crew, with a worker; takes seconds at its first use.

    Raises:
        ConfigError: a broker, model, key or package is missing.
    """
    return _RUNTIME.mesh(crew)


@overload
def start(
    agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True
) -> Run[Out]: ...
@overload
def start(
    agent: Crew[Out], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = True
) -> Run[Out]: ...
def start(
    agent: Agent[Any, Any] | Crew[Any],
    task: Any = "",
    *,
    run_id: str = "",
    history: Sequence[Message] = (),
    stream: bool = True,
) -> Run[Any]:
    """Begin a run and come back at once with its handle; a script or notebook needs nothing else.

    Args:
        agent: an agent, or a Crew whose first agent leads.
        run_id: its id; the same id with the same task answers the run that is there.
        history: messages to put before the task: `other_run.messages()`.
        stream: whether `run.tokens()` has something to give.

    Raises:
        MeshError: called in a flow or a tool, or where an event loop runs; there, await `agentmesh.aio.start`.
        ConfigError: a broker, model, key or package is missing.
    """
    refuse_inside_step("start")
    refuse_on_event_loop("start()", "await agentmesh.aio.start(…)")
    crew = local_crew(agent)
    lead = agent.lead if isinstance(agent, Crew) else agent
    return local_mesh(crew).start(lead, task, run_id=run_id, history=history, stream=stream)


@overload
def run(
    agent: Agent[Out, Any],
    task: Any = "",
    *,
    run_id: str = "",
    history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Out: ...
@overload
def run(
    agent: Crew[Out],
    task: Any = "",
    *,
    run_id: str = "",
    history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Out: ...
def run(
    agent: Agent[Any, Any] | Crew[Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Any:  # fmt: skip
    """The agent's answer: `start` and its result.

    Raises:
        RunError: the run ended without a value.
        TimeoutError: it has not ended in `timeout_s`; it can be resumed under its id.
        MeshError: called in a flow or a tool, or where an event loop runs; there, await `agentmesh.aio.run`.
    """
    refuse_inside_step("run")
    refuse_on_event_loop("run()", "await agentmesh.aio.run(…)")
    crew = local_crew(agent)
    lead = agent.lead if isinstance(agent, Crew) else agent
    return local_mesh(crew).run(lead, task, run_id=run_id, history=history, timeout_s=timeout_s)


def stop() -> None:
    """Stop the workers that `run` and `start` keep in this process."""
    _RUNTIME.close()
