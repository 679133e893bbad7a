"""Where a crew runs: a Celery app, a journal, models. Made without I/O; used from any thread or event loop."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from celery import Celery, Signature, group

from agentmesh.celery import canvas
from agentmesh.celery.app import journal_url, make_app
from agentmesh.celery.eager import is_eager
from agentmesh.celery.embedded import Admits, InProcessWorker, in_process_worker
from agentmesh.celery.event_loop import blocking_executor, run_sync
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.celery.registry import register
from agentmesh.config import Config, load_config
from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import Suspects
from agentmesh.engine.async_run import AsyncRun
from agentmesh.engine.blocking import refuse_inside_step, refuse_on_event_loop, waits
from agentmesh.engine.executor import LocalExecutor
from agentmesh.engine.run import Run
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import RunHead
from agentmesh.message import Message
from agentmesh.model import Model
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.observer import ObservedExecutor, Observer
from agentmesh.observability.tracing import TracingObserver, current_traceparent

Out = TypeVar("Out")
ModelOf = Callable[[Any], tuple[Model, str]]


class AsyncMesh:
    """A mesh for code on an event loop: Mesh's words to await. `mesh.aio` is one."""

    def __init__(self, runtime: MeshRuntime, close_models: Callable[[], Any] | None = None) -> None:
        self._runtime, self._close_models = runtime, close_models

    async def start(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = False,
        origin: str = "",
    ) -> AsyncRun[Out]:  # fmt: skip
        """Begin a run and come back at once; `mesh.begin` is short for it."""
        new = self._runtime.new_run(agent, task, run_id=run_id, history=history, stream=stream, origin=origin)
        await self._runtime.begin(new)
        return self.get(new.run_id)

    async def run(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (),
        timeout_s: float | None = None,
    ) -> Out:  # fmt: skip
        """`start` and its result; refused inside a step, whose worker it would hold."""
        refuse_inside_step("run")
        started = await self.start(agent, task, run_id=run_id, history=history)
        return await started.result(timeout_s=timeout_s)

    def get(self, run_id: str) -> AsyncRun[Any]:
        """A handle to a run; whether it exists shows when it is used."""
        return self._runtime.process_state.client.get(run_id)

    async def runs(self, *, limit: int = 50) -> list[RunHead]:
        """The newest root runs."""
        return list(await self._runtime.journal.runs(limit=limit))

    async def check(self) -> None:
        """Look once whether the broker answers and is safe to use."""
        await asyncio.to_thread(self._runtime.check)

    async def close(self) -> None:
        """Give back this loop's connections; the mesh may be used again."""
        await self._runtime.journal.close()
        if self._close_models is not None:
            await self._close_models()


class Mesh:
    """Runs a crew on a Celery app: yours, or one it makes.

    Construction does no I/O. The app's conf is read, never written. Calls that wait need a thread without a running event
    loop; on one, await `mesh.begin(…)` and the words of `mesh.aio`.

    Args:
        app: your Celery app; None makes one for `broker`.
        broker: a broker URL; not together with `app`.
        journal: `redis://…`, `unix://…` or a Journal; empty is the broker when that is Redis or Valkey. A Journal object
            sends its own messages, and is used from several threads and event loops.
        models: `provider:name` or an object, to a Model; the default knows `openai:` and `local:`.
        observers: told of steps and runs, besides tracing.

    Attributes:
        aio: the same mesh with the same words to await.

    Raises:
        ConfigError: no broker is named, or the broker cannot hold the journal and no journal is named.
    """

    def __init__(
        self, crew: Crew, *, app: Celery | None = None, broker: str = "", journal: str | Journal = "",
        config: Config | None = None, models: ModelOf | None = None, observers: Sequence[Observer] = (),
    ) -> None:  # fmt: skip
        models = models or ModelRegistry()
        self._runtime = make_runtime(
            crew, app=app, broker=broker, journal=journal, config=config, models=models, observers=observers
        )
        self.crew, self.app, self.config = crew, self._runtime.app, self._runtime.config
        self.aio = AsyncMesh(self._runtime, getattr(models, "close", None))

    # ---- runs ----------------------------------------------------------------------------------
    def start(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = False,
        origin: str = "",
    ) -> Run[Out]:  # fmt: skip
        """Begin a run and come back at once; the same id with the same task answers the run that is there.

        Args:
            run_id: its id: letters, digits, `_`, `.`, `-`, at most 64; a new one when empty.
            history: messages to put before the task: `other_run.messages()`.
            stream: whether `run.tokens()` will have something to give.
            origin: the crew file, for `agentmesh runs resume`.

        Raises:
            DefinitionError: the task is not what the agent takes, or the id is not one.
            RunError: the id is taken by another task.
            MeshError: called in a flow or a tool, or where an event loop runs.
        """
        refuse_inside_step("start")
        refuse_on_event_loop("mesh.start()", "await mesh.begin(…)")
        return Run(run_sync(self.aio.start(agent, task, run_id=run_id, history=history, stream=stream, origin=origin)))

    def run(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (),
        timeout_s: float | None = None,
    ) -> Out:  # fmt: skip
        """`start` and its result."""
        refuse_inside_step("run")
        refuse_on_event_loop("mesh.run()", "await mesh.aio.run(…)")
        return run_sync(self.aio.run(agent, task, run_id=run_id, history=history, timeout_s=timeout_s))

    async def begin(
        self, agent: Agent[Out, Any], task: Any = "", *, run_id: str = "", history: Sequence[Message] = (), stream: bool = False,
        origin: str = "",
    ) -> AsyncRun[Out]:  # fmt: skip
        """`start`, for code on an event loop: `run = await mesh.begin(agent, task)`, then `await run`."""
        return await self.aio.start(agent, task, run_id=run_id, history=history, stream=stream, origin=origin)

    def get(self, run_id: str) -> Run[Any]:
        """A handle to a run; whether it exists shows when it is used."""
        return Run(self.aio.get(run_id))

    @waits("mesh")
    def runs(self, *, limit: int = 50) -> list[RunHead]:
        """The newest root runs."""
        return run_sync(self.aio.runs(limit=limit))

    # ---- Celery --------------------------------------------------------------------------------
    def signature(self, agent: Agent[Any, Any], task: Any = None) -> Signature:
        """The agent as a signature of the app, for your own chain, group or chord; the result is the run's value.

        Without a task it takes what the canvas gives it: text as it is, anything else as JSON text.
        """
        args = () if task is None else (agent._task_json(task),)
        signature: Signature = self.app.tasks[canvas.AgentTask.name].s(
            *args, agent=agent.name, crew=self.crew.name, fields=agent._fields_json()
        )
        return signature

    s = signature  # Celery's own short word

    def map(self, agent: Agent[Any, Any], tasks: Iterable[Any]) -> group:
        """A group with one run a task, results in the order of the tasks: what Celery's `map` and `chunks` are used for."""
        return group([self.s(agent, task) for task in tasks])

    # ---- its life ------------------------------------------------------------------------------
    @waits("mesh")
    def check(self) -> None:
        """Look once whether the broker answers and is safe to use.

        Raises:
            ServiceDown, ConfigError: it is not.
        """
        self._runtime.check()

    def worker(
        self, *, queues: Sequence[str] = (), concurrency: int = 0, admits: Admits | None = None
    ) -> InProcessWorker:
        """A worker in a thread of this process: `with mesh.worker(): …`, or `async with`.

        Args:
            concurrency: of its queues together, and of each group in front of the same servers; 0 is as declared.
            admits: how many more steps there is room for, given how many are in flight; all queues share it then.
        """
        return in_process_worker(self._runtime, queues=queues, concurrency=concurrency, admits=admits)

    @waits("mesh")
    def close(self) -> None:
        """Give back connections; the mesh may be used again."""
        run_sync(self.aio.close())


def make_runtime(
    crew: Crew, *, app: Celery | None = None, broker: str = "", journal: str | Journal = "", config: Config | None = None,
    models: ModelOf | None = None, worker: str = "", observers: Sequence[Observer] = (), suspects: Suspects = "include",
) -> MeshRuntime:  # fmt: skip
    """What a Mesh and a worker process stand on: the crew, registered on its app.

    Args:
        worker: the process's name in leases; a unique one when empty.
        suspects: whether this process takes steps that were in flight at crashes.
    """
    settings = config or load_config()
    app = app if app is not None else make_app(broker or settings.broker)
    source = journal or settings.journal
    if isinstance(source, str) and not is_eager(app):
        source = journal_url(str(app.conf.broker_url or broker or settings.broker), source)
    model, model_of = crew.model or settings.model, models or ModelRegistry()
    watchers = (*observers, TracingObserver())

    def make_executor() -> ObservedExecutor:
        executor = LocalExecutor(
            model_of=model_of, servers_of=lambda step: crew.queues.servers_of(step, model), model=model, deps=crew.deps,
            executor=blocking_executor(64),
        )  # fmt: skip
        return ObservedExecutor(executor, watchers, model)

    return register(MeshRuntime(
        crew, app, config=settings, journal=source, make_executor=make_executor, traceparent=current_traceparent,
        worker=worker, suspects=suspects,
    ))  # fmt: skip
