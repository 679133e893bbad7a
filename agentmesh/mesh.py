"""Where a crew runs: a Celery app, a journal, models. Made without I/O; used from any thread or event loop."""

import math
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

from celery import Celery, Signature, group

from agentmesh.celery import canvas
from agentmesh.celery.app import journal_url, make_app, same_server
from agentmesh.celery.beat import add_schedules
from agentmesh.celery.bootstep import add_bootstep
from agentmesh.celery.broker import QueueLengths, check_broker
from agentmesh.celery.dispatch import CeleryDispatch
from agentmesh.celery.eager import eager_process_state, is_eager
from agentmesh.celery.embedded import Admits, InProcessWorker, make_workers
from agentmesh.celery.event_loop import blocking_executor, run_sync
from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.celery.mesh_runtime import ProcessState
from agentmesh.celery.publisher import publisher_for
from agentmesh.celery.tasks import register_tasks
from agentmesh.config import Config, load
from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import Suspects
from agentmesh.definitions.step import RUNNING_INSIDE
from agentmesh.engine.engine import Engine
from agentmesh.engine.executor import LocalExecutor
from agentmesh.engine.run import Run, RunClient
from agentmesh.errors import DefinitionError, MeshError, RunError
from agentmesh.journal.events import Event
from agentmesh.journal.journal import Journal
from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.types import Accepted, Refused, RunHead, RunSpec
from agentmesh.message import Message
from agentmesh.model import Model
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.observer import ObservedExecutor, Observer
from agentmesh.observability.tracing import TracingObserver, current_traceparent
from agentmesh.schema import canonical

Out = TypeVar("Out")
ModelOf = Callable[[Any], tuple[Model, str]]
RUN_ID = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-")


class Mesh:
    """Runs a crew on a Celery app: yours, or one it makes.

    Construction does no I/O. The app's conf is read, never written.

    Args:
        app: your Celery app; None makes one for `broker`.
        broker: a broker URL; not together with `app`.
        journal: `redis://…` or `unix://…`; empty is the broker when that is Redis or Valkey.
        models: `provider:name` or an object, to a Model; the default knows `openai:` and `local:`.
        sights, suspects: for whoever runs workers: onlookers besides Tracing; where suspects are worked on.

    Raises:
        ConfigError: no broker is named, or the broker cannot hold the journal and no journal is named.
    """

    def __init__(
        self, crew: Crew, *, app: Celery | None = None, broker: str = "", journal: str = "",
        config: Config | None = None, models: ModelOf | None = None, worker: str = "", observers: Sequence[Observer] = (),
        suspects: Suspects = "include",
    ) -> None:  # fmt: skip
        self.crew, self.config = crew, config or load()
        broker = broker or self.config.broker
        self.app = app if app is not None else make_app(broker)
        self.broker = str(self.app.conf.broker_url or broker)
        url = journal or self.config.journal
        self.journal_url = url if is_eager(self.app) else journal_url(self.broker, url)
        self._worker = worker or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self._pid, self.suspects = os.getpid(), suspects
        self._models, self._observers = models or ModelRegistry(), (*observers, TracingObserver())
        self._lock = threading.Lock()
        self._checked = False
        self.dispatch = CeleryDispatch(self.app, crew.name)
        self._process_states: dict[tuple[int, bool], ProcessState] = {}
        homes = register_tasks(self.app)
        canvas.register_canvas(self.app, homes)
        add_bootstep(self.app)
        homes[crew.name] = self
        if crew.schedules:
            add_schedules(self.app, homes, crew.name, list(crew.schedules.values()))

    # ---- for users -----------------------------------------------------------------------------
    def start(
        self, agent: Agent[Out, Any], task: Any = "", *, id: str = "", history: Sequence[Message] = (), stream: bool = False,
        origin: str = "",
    ) -> Run[Out]:  # fmt: skip
        """Begin a run and come back at once; the same id with the same task answers the run that is there.

        Args:
            stream: whether `run.tokens()` will have something to give.
            origin: the crew file, for `agentmesh runs resume`.

        Raises:
            DefinitionError: the task is not what the agent takes, or the id is not one.
            RunError: the id is taken by another task.
        """
        self._refuse_inside_step("start")
        return run_sync(self.begin(agent, task, id=id, history=history, stream=stream, origin=origin))

    def run(self, agent: Agent[Out, Any], task: Any = "", *, timeout_s: float | None = None, **options: Any) -> Out:
        """`start` and its result."""
        self._refuse_inside_step("run")
        return self.start(agent, task, **options).result(timeout_s=timeout_s)

    async def begin(
        self, agent: Agent[Out, Any], task: Any = "", *, id: str = "", history: Sequence[Message] = (), stream: bool = False,
        origin: str = "",
    ) -> Run[Out]:  # fmt: skip
        """`start`, for code on an event loop."""
        spec = self._spec(agent, task, id or uuid.uuid4().hex[:12], history, stream, origin or self.crew._file)
        answer = await self.process_state.begin(spec)
        if isinstance(answer, Refused):
            raise RunError(
                f"run {spec.id!r} already exists with another agent or task",
                hint=f"use another id, or see: agentmesh runs show {spec.id}",
                run_id=spec.id,
            )
        return self.get(spec.id)

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

    def begin_for_canvas(
        self, agent: str, task: Any, run_id: str, saved: dict[str, Any], fields: dict[str, Any]
    ) -> Sequence[Event]:
        """See MeshRuntime."""
        who = self.crew.agent(agent, fields)
        if who.task_type is str and not isinstance(task, str):
            task = canonical(task)
        spec = self._spec(who, task, run_id, (), False, self.crew._file)
        if not is_eager(self.app):
            home = self.crew.queues.broker_name(self.crew.queues.first)
            spec = replace(spec, canvas=saved, finish=self.dispatch.finish(run_id, agent, home))
        if isinstance(run_sync(_begun(self.process_state, spec)), Refused):
            raise RunError(f"run {run_id!r} exists with another agent or task", run_id=run_id)
        return run_sync(self.journal.events(run_id)) if is_eager(self.app) else ()

    def begin_scheduled(self, name: str, now: datetime) -> str:
        """See MeshRuntime."""
        one = self.crew.schedules[name]
        return self.start(one.agent, one.task, id=one.run_id(one.times.last(now))).id

    def get(self, run_id: str) -> Run[Any]:
        """A handle to a run; whether it exists shows when it is used."""
        return Run(run_id, self.process_state.client)

    def runs(self, *, limit: int = 50) -> list[RunHead]:
        """The newest root runs."""
        return run_sync(self.journal.runs(limit=limit))

    def check(self) -> None:
        """Look once whether broker and journal answer and are safe to use.

        Raises:
            ServiceDown, ConfigError: they are not; the message has the mend.
        """
        with self._lock:
            if not self._checked and not is_eager(self.app):
                check_broker(self.app)
                self._checked = True

    # ---- for workers ---------------------------------------------------------------------------
    @property
    def process_state(self) -> ProcessState:
        """What the mesh has in this process."""
        key = os.getpid(), is_eager(self.app)
        site = self._process_states.get(key)
        if site is None:  # no lock, which a fork might find taken: of two threads that get here one wins
            site = self._process_states.setdefault(key, self._make_process_state(*key))
        return site

    def _make_process_state(self, pid: int, eager: bool) -> ProcessState:
        model, name = self.crew.model or self.config.model, self.lease_name(pid)
        doer = LocalExecutor(
            model_of=self._models, servers_of=lambda step: self.crew.queues.servers_of(step, model), model=model,
            deps=self.crew.deps, executor=blocking_executor(64),
        )  # fmt: skip
        watched = ObservedExecutor(doer, self._observers, model)
        if eager:
            return eager_process_state(self.crew, watched, name, watched.ended)
        journal = make_journal(self.config, self.app, self.journal_url)
        engine = Engine(
            crew=self.crew, journal=journal, dispatch=self.dispatch, executor=watched, worker=name, on_run_end=watched.ended,
            apart=self.suspects == "exclude", model=model,
        )  # fmt: skip
        client = RunClient(crew=self.crew, journal=journal, run_sync=run_sync, dispatch=self.dispatch)
        return ProcessState(name, journal, client, engine, self.dispatch, engine.begin)

    @property
    def journal(self) -> Journal:
        """This process's journal."""
        return self.process_state.journal

    @property
    def engine(self) -> Engine:
        """This process's engine for the crew."""
        return self.process_state.engine

    @property
    def worker_name(self) -> str:
        """This process's name in leases."""
        return self.process_state.worker

    def lease_name(self, pid: int) -> str:
        """See MeshRuntime."""
        return self._worker if pid == self._pid else f"{self._worker}/{pid}"

    def broker_queues(self) -> list[str]:
        """See MeshRuntime."""
        return self.crew.queues.broker_names()

    def active_engine(self) -> Engine:
        """See MeshRuntime."""
        housekeeper = self.process_state.housekeeper or self._start_housekeeping(
            (), math.inf
        )  # a child of a prefork pool: its parent sweeps
        housekeeper.wake()
        return self.process_state.engine

    def start_housekeeping(self, *, queues: Sequence[str] = ()) -> Housekeeper:
        """Start renewing leases and sweeping in a thread of this process."""
        return self._start_housekeeping(queues or self.crew.queues.broker_names(), self.config.sweep_s)

    def _start_housekeeping(self, queues: Sequence[str], sweep_s: float) -> Housekeeper:
        site = self.process_state
        journal = make_journal(self.config, self.app, self.journal_url)
        housekeeper = Housekeeper(
            engines=[site.engine], journal=journal, worker=site.worker, queues=queues,
            lengths=None if journal.pushes else QueueLengths(self.app), ttl_s=self.config.lease_s, sweep_s=sweep_s,
        )  # fmt: skip
        site.housekeepers.append(housekeeper)
        housekeeper.start()
        return housekeeper

    def stop_housekeeping(self, housekeeper: Housekeeper | None = None) -> bool:
        """See MeshRuntime."""
        tenders = self.process_state.housekeepers
        for one in [housekeeper] if housekeeper is not None else list(tenders):
            tenders.remove(one)
            one.stop()
        return not tenders

    async def release_processes(self, pids: Sequence[int]) -> None:
        """See MeshRuntime."""
        for pid in pids:
            await self.journal.release(self.lease_name(pid), crashed=False, queues=self.crew.queues.broker_names())

    def release_dead(self, pid: int) -> None:
        """See MeshRuntime."""
        if self.process_state.housekeeper is not None and pid != os.getpid():
            self.process_state.housekeeper.release_dead(self.lease_name(pid))

    def worker(
        self, *, queues: Sequence[str] = (), concurrency: int = 0, admits: Admits | None = None
    ) -> InProcessWorker:
        """A worker in a thread of this process: `with mesh.worker(): …`.

        Args:
            concurrency: of its queues together, and of each group in front of the same servers; 0 is as declared.
            admits: how many more steps there is room for, given how many are in hand; all queues share it then.
        """
        workers = make_workers(
            self.app, self.crew, queues, concurrency=concurrency, suspects=self.suspects, admits=admits
        )
        return InProcessWorker([self], workers)

    def close(self) -> None:
        """Give back connections; the mesh may be used again."""
        run_sync(self.journal.close())
        close = getattr(self._models, "close", None)
        if close is not None:
            run_sync(close())

    # ---- parts ---------------------------------------------------------------------------------
    def _spec(
        self, agent: Agent[Any, Any], task: Any, run_id: str, history: Sequence[Message], stream: bool, origin: str
    ) -> RunSpec:
        if not 1 <= len(run_id) <= 64 or not set(run_id) <= RUN_ID:
            raise DefinitionError(f"run id {run_id!r} must be 1 to 64 of letters, digits, `_`, `.`, `-`")
        self.crew.agent(agent.name)
        home = self.crew.queues.broker_name(self.crew.queues.first)
        return RunSpec(
            run_id, self.crew.name, self.crew.version, agent.name, agent._task_json(task), agent._fields_json(),
            [m.to_json() for m in history], limits=self.crew.limits.to_json(),
            wire=self.process_state.dispatch.advance(run_id, agent.name, home), origin=origin, stream=stream,
            trace=current_traceparent(),
        )  # fmt: skip

    def _refuse_inside_step(self, verb: str) -> None:
        inside = RUNNING_INSIDE.get()
        if inside:
            mend = (
                "write `ctx.do(Researcher().on(task))`"
                if "flow" in inside
                else "make it an agent's flow, or a team member"
            )
            raise MeshError(f"`{verb}()` inside {inside} would block a worker while it waits: {mend}")


async def _begun(site: ProcessState, spec: RunSpec) -> Accepted | Refused:
    return await site.begin(spec)


def make_journal(config: Config, app: Celery, url: str = "") -> RedisJournal:
    """The journal of these settings; where the broker is another server, a publisher sends what the scripts cannot push."""
    broker = str(app.conf.broker_url or config.broker)
    url = url or journal_url(broker, config.journal)
    # A prefix of the user's broker keys is kombu's to add, not the scripts'.
    push = same_server(broker, url) and not (app.conf.broker_transport_options or {}).get("global_keyprefix")
    return RedisJournal(
        url, prefix=config.prefix, push=push, send=None if push else publisher_for(app),
        ttl_ms=round(config.lease_s * 1000), retain_ms=round(config.retain_days * 86_400_000),
    )  # fmt: skip
