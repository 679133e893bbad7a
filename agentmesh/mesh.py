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

from agentmesh.agent import Agent
from agentmesh.celery import canvas
from agentmesh.celery.app import QueueLengths, check_broker, journal_url, make_app, same_server
from agentmesh.celery.beat import schedule
from agentmesh.celery.dispatch import CeleryDispatch
from agentmesh.celery.eager import eager_site, is_eager
from agentmesh.celery.embedded import Admits
from agentmesh.celery.inprocess import InProcess, embedded
from agentmesh.celery.loop import drive, threads
from agentmesh.celery.publish import publisher_of
from agentmesh.celery.site import Site
from agentmesh.celery.steps import attach
from agentmesh.celery.sweep import Tender
from agentmesh.celery.tasks import register
from agentmesh.config import Config, load
from agentmesh.crew import Crew
from agentmesh.doing import Doer
from agentmesh.engine import Engine
from agentmesh.errors import DefinitionError, MeshError, RunError
from agentmesh.event import Event
from agentmesh.journal import Journal
from agentmesh.journals.redis import RedisJournal
from agentmesh.message import Message
from agentmesh.model import Model
from agentmesh.models.named import Models
from agentmesh.ports import Accepted, Refused, RunHead, RunSpec
from agentmesh.queue import Suspects
from agentmesh.run import Client, Run
from agentmesh.schema import canonical
from agentmesh.sight import Sight, Watched
from agentmesh.step import INSIDE
from agentmesh.telemetry import Tracing, current

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
        config: Config | None = None, models: ModelOf | None = None, worker: str = "", sights: Sequence[Sight] = (),
        suspects: Suspects = "too",
    ) -> None:  # fmt: skip
        self.crew, self.config = crew, config or load()
        broker = broker or self.config.broker
        self.app = app if app is not None else make_app(broker)
        self.broker = str(self.app.conf.broker_url or broker)
        url = journal or self.config.journal
        self.journal_url = url if is_eager(self.app) else journal_url(self.broker, url)
        self._worker = worker or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self._pid, self.suspects = os.getpid(), suspects
        self._models, self._sights = models or Models(), (*sights, Tracing())
        self._lock = threading.Lock()
        self._checked = False
        self.dispatch = CeleryDispatch(self.app, crew.name)
        self._sites: dict[tuple[int, bool], Site] = {}
        homes = register(self.app)
        canvas.register(self.app, homes)
        attach(self.app)
        homes[crew.name] = self
        if crew.schedules:
            schedule(self.app, homes, crew.name, list(crew.schedules.values()))

    # ---- for users -----------------------------------------------------------------------------
    def start(
        self, agent: Agent[Out], task: Any = "", *, id: str = "", history: Sequence[Message] = (), stream: bool = False,
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
        self._outside("start")
        return drive(self.begin(agent, task, id=id, history=history, stream=stream, origin=origin))

    def run(self, agent: Agent[Out], task: Any = "", *, timeout_s: float | None = None, **options: Any) -> Out:
        """`start` and its result."""
        self._outside("run")
        return self.start(agent, task, **options).result(timeout_s=timeout_s)

    async def begin(
        self, agent: Agent[Out], task: Any = "", *, id: str = "", history: Sequence[Message] = (), stream: bool = False,
        origin: str = "",
    ) -> Run[Out]:  # fmt: skip
        """`start`, for code on an event loop."""
        spec = self._spec(agent, task, id or uuid.uuid4().hex[:12], history, stream, origin or self.crew.file)
        answer = await self.site.begin(spec)
        if isinstance(answer, Refused):
            raise RunError(
                f"run {spec.id!r} exists with another agent or task; choose another id, or look at it: agentmesh runs show {spec.id}",
                run_id=spec.id,
            )
        return self.get(spec.id)

    def s(self, agent: Agent[Any], task: Any = None) -> Signature:
        """The agent as a signature of the app, for your own chain, group or chord; the result is the run's value.

        Without a task it takes what the canvas gives it: text as it is, anything else as JSON text.
        """
        args = () if task is None else (agent.task_json(task),)
        wanted: Signature = self.app.tasks[canvas.AgentTask.name].s(
            *args, agent=agent.name, crew=self.crew.name, fields=agent.fields_json()
        )
        return wanted

    def map(self, agent: Agent[Any], tasks: Iterable[Any]) -> group:
        """A group with one run a task, results in the order of the tasks: what Celery's `map` and `chunks` are used for."""
        return group([self.s(agent, task) for task in tasks])

    def begin_for_canvas(
        self, agent: str, task: Any, run_id: str, saved: dict[str, Any], fields: dict[str, Any]
    ) -> Sequence[Event]:
        """See tasks.Home."""
        who = self.crew.agent(agent, fields)
        if who.task_type is str and not isinstance(task, str):
            task = canonical(task)
        spec = self._spec(who, task, run_id, (), False, self.crew.file)
        if not is_eager(self.app):
            home = self.crew.broker_queue(self.crew.queue)
            spec = replace(spec, canvas=saved, finish=self.dispatch.finish(run_id, agent, home))
        if isinstance(drive(_begun(self.site, spec)), Refused):
            raise RunError(f"run {run_id!r} exists with another agent or task", run_id=run_id)
        return drive(self.journal.events(run_id)) if is_eager(self.app) else ()

    def begin_scheduled(self, name: str, now: datetime) -> str:
        """See tasks.Home."""
        one = self.crew.schedules[name]
        return self.start(one.agent, one.task, id=one.run_id(one.times.last(now))).id

    def get(self, run_id: str) -> Run[Any]:
        """A handle to a run; whether it exists shows when it is used."""
        return Run(run_id, self.site.client)

    def runs(self, *, limit: int = 50) -> list[RunHead]:
        """The newest root runs."""
        return drive(self.journal.runs(limit=limit))

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
    def site(self) -> Site:
        """What the mesh has in this process."""
        key = os.getpid(), is_eager(self.app)
        site = self._sites.get(key)
        if site is None:  # no lock, which a fork might find taken: of two threads that get here one wins
            site = self._sites.setdefault(key, self._make_site(*key))
        return site

    def _make_site(self, pid: int, eager: bool) -> Site:
        model, name = self.crew.model or self.config.model, self.name_of(pid)
        doer = Doer(
            model_of=self._models, servers_of=lambda step: self.crew.servers_of(step, model), model=model,
            deps=self.crew.deps, executor=threads(64),
        )  # fmt: skip
        watched = Watched(doer, self._sights, model)
        if eager:
            return eager_site(self.crew, watched, name, watched.ended)
        journal = make_journal(self.config, self.app, self.journal_url)
        engine = Engine(
            crew=self.crew, journal=journal, dispatch=self.dispatch, doer=watched, worker=name, ended=watched.ended,
            apart=self.suspects == "elsewhere", model=model,
        )  # fmt: skip
        client = Client(crew=self.crew, journal=journal, drive=drive, dispatch=self.dispatch)
        return Site(name, journal, client, engine, self.dispatch, engine.begin)

    @property
    def journal(self) -> Journal:
        """This process's journal."""
        return self.site.journal

    @property
    def engine(self) -> Engine:
        """This process's engine for the crew."""
        return self.site.engine

    @property
    def worker_name(self) -> str:
        """This process's name in leases."""
        return self.site.worker

    def name_of(self, pid: int) -> str:
        """See tasks.Home."""
        return self._worker if pid == self._pid else f"{self._worker}/{pid}"

    def serves(self) -> list[str]:
        """See tasks.Home."""
        return self.crew.broker_queues()

    def working(self) -> Engine:
        """See tasks.Home."""
        tender = self.site.tender or self._tend((), math.inf)  # a child of a prefork pool: its parent sweeps
        tender.stir()
        return self.site.engine

    def tend(self, *, queues: Sequence[str] = ()) -> Tender:
        """Start renewing leases and sweeping in a thread of this process."""
        return self._tend(queues or self.crew.broker_queues(), self.config.sweep_s)

    def _tend(self, queues: Sequence[str], sweep_s: float) -> Tender:
        site = self.site
        journal = make_journal(self.config, self.app, self.journal_url)
        tender = Tender(
            engines=[site.engine], journal=journal, worker=site.worker, queues=queues,
            lengths=None if journal.pushes else QueueLengths(self.app), ttl_s=self.config.lease_s, sweep_s=sweep_s,
        )  # fmt: skip
        site.tenders.append(tender)
        tender.start()
        return tender

    def untend(self, tender: Tender | None = None) -> bool:
        """See tasks.Home."""
        tenders = self.site.tenders
        for one in [tender] if tender is not None else list(tenders):
            tenders.remove(one)
            one.stop()
        return not tenders

    async def leave(self, pids: Sequence[int]) -> None:
        """See tasks.Home."""
        for pid in pids:
            await self.journal.release(self.name_of(pid), crashed=False, queues=self.crew.broker_queues())

    def bury(self, pid: int) -> None:
        """See tasks.Home."""
        if self.site.tender is not None and pid != os.getpid():
            self.site.tender.bury(self.name_of(pid))

    def worker(self, *, queues: Sequence[str] = (), concurrency: int = 0, admits: Admits | None = None) -> InProcess:
        """A worker in a thread of this process: `with mesh.worker(): …`.

        Args:
            concurrency: of its queues together, and of each group in front of the same servers; 0 is as declared.
            admits: how many more steps there is room for, given how many are in hand; all queues share it then.
        """
        workers = embedded(self.app, self.crew, queues, concurrency=concurrency, suspects=self.suspects, admits=admits)
        return InProcess([self], workers)

    def close(self) -> None:
        """Give back connections; the mesh may be used again."""
        drive(self.journal.close())
        close = getattr(self._models, "close", None)
        if close is not None:
            drive(close())

    # ---- parts ---------------------------------------------------------------------------------
    def _spec(
        self, agent: Agent[Any], task: Any, run_id: str, history: Sequence[Message], stream: bool, origin: str
    ) -> RunSpec:
        if not 1 <= len(run_id) <= 64 or not set(run_id) <= RUN_ID:
            raise DefinitionError(f"run id {run_id!r} must be 1 to 64 of letters, digits, `_`, `.`, `-`")
        self.crew.agent(agent.name)
        home = self.crew.broker_queue(self.crew.queue)
        return RunSpec(
            run_id, self.crew.name, self.crew.version, agent.name, agent.task_json(task), agent.fields_json(),
            [m.to_json() for m in history], limits=self.crew.limits.to_json(),
            wire=self.site.dispatch.advance(run_id, agent.name, home), origin=origin, stream=stream,
            trace=current(),
        )  # fmt: skip

    def _outside(self, verb: str) -> None:
        inside = INSIDE.get()
        if inside:
            mend = (
                "write `ctx.do(Researcher().on(task))`"
                if "flow" in inside
                else "make it an agent's flow, or a team member"
            )
            raise MeshError(f"`{verb}()` inside {inside} would hold a worker while it waits: {mend}")


async def _begun(site: Site, spec: RunSpec) -> Accepted | Refused:
    return await site.begin(spec)


def make_journal(config: Config, app: Celery, url: str = "") -> RedisJournal:
    """The journal of these settings; where the broker is another server, a publisher sends what the scripts cannot push."""
    broker = str(app.conf.broker_url or config.broker)
    url = url or journal_url(broker, config.journal)
    # A prefix of the user's broker keys is kombu's to add, not the scripts'.
    push = same_server(broker, url) and not (app.conf.broker_transport_options or {}).get("global_keyprefix")
    return RedisJournal(
        url, prefix=config.prefix, push=push, send=None if push else publisher_of(app),
        ttl_ms=round(config.lease_s * 1000), retain_ms=round(config.retain_days * 86_400_000),
    )  # fmt: skip
