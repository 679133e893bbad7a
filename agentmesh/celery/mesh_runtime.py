"""A crew on a Celery app as tasks and workers see it: its engine, its leases, the runs that a canvas or beat begins."""

import math
import os
import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

from celery import Celery

from agentmesh.celery.broker import QueueLengths, check_broker
from agentmesh.celery.dispatch import CeleryDispatch
from agentmesh.celery.eager import eager_process_state, is_eager
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.celery.journal_factory import make_journal
from agentmesh.celery.process_state import ProcessState
from agentmesh.config import Config
from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import Suspects
from agentmesh.engine.async_run import RunClient
from agentmesh.engine.engine import Engine
from agentmesh.engine.executor import StepExecutor
from agentmesh.engine.planner import root_run
from agentmesh.engine.replay import History
from agentmesh.errors import RunError
from agentmesh.journal.events import Event
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import Accepted, NewRun, Refused
from agentmesh.message import Message
from agentmesh.schema import canonical
from agentmesh.sized_cache import MIB


class RunExecutor(StepExecutor, Protocol):
    """Executes steps, and is told of each run that this process ends."""

    def ended(self, history: History, end: Event) -> None:
        """A run was ended by this process."""
        ...


class MeshRuntime:
    """One crew on one app. It connects to nothing before its first use in a process.

    Args:
        journal: a URL or a Journal.
        make_executor: makes this process's executor.
        traceparent: the W3C trace context that new runs belong to, or "".
        worker: the name in leases; a unique one when empty.
        suspects: whether this process executes suspects, which are steps that were in flight at crashes.
    """

    def __init__(
        self, crew: Crew, app: Celery, *, config: Config, journal: str | Journal, make_executor: Callable[[], RunExecutor],
        traceparent: Callable[[], str], worker: str = "", suspects: Suspects = "include",
    ) -> None:  # fmt: skip
        self.crew, self.app, self.config, self.suspects = crew, app, config, suspects
        self.dispatch = CeleryDispatch(app, crew.name)
        self._journal_source, self._make_executor, self._traceparent = journal, make_executor, traceparent
        self._worker = worker or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:6]}"
        self._pid = os.getpid()
        self._process_states: dict[tuple[int, bool], ProcessState] = {}
        self._check_lock, self._checked = threading.Lock(), False

    # ---- its state in this process -------------------------------------------------------------
    @property
    def process_state(self) -> ProcessState:
        """The state of this process, made at its first use."""
        key = os.getpid(), is_eager(self.app)
        state = self._process_states.get(key)
        if state is None:  # no lock, which a fork might copy while it is held: of two threads here one wins
            state = self._process_states.setdefault(key, self._make_process_state(*key))
        return state

    def _make_process_state(self, pid: int, eager: bool) -> ProcessState:
        executor, worker = self._make_executor(), self.lease_name(pid)
        if eager:
            return eager_process_state(self.crew, executor, worker, executor.ended)
        journal = make_journal(self.config, self.app, self._journal_source)
        engine = Engine(
            crew=self.crew, journal=journal, dispatch=self.dispatch, executor=executor, worker=worker,
            on_run_end=executor.ended, apart=self.suspects == "exclude", model=self.crew.model or self.config.model,
            history_cache_bytes=int(self.config.history_cache_mb * MIB),
        )  # fmt: skip
        client = RunClient(crew=self.crew, journal=journal, run_sync=run_sync, dispatch=self.dispatch)
        return ProcessState(worker, journal, client, engine, self.dispatch, engine.begin)

    @property
    def journal(self) -> Journal:
        """This process's journal."""
        return self.process_state.journal

    @property
    def engine(self) -> Engine:
        """This process's engine for the crew."""
        return self.process_state.engine

    def check(self) -> None:
        """Check once that the broker responds and is safe to use.

        Raises:
            ServiceDown: it does not respond.
            ConfigError: it is not safe to use.
        """
        with self._check_lock:
            if not self._checked and not is_eager(self.app):
                check_broker(self.app)
                self._checked = True

    def lease_name(self, pid: int) -> str:
        """The name under which a process holds leases."""
        return self._worker if pid == self._pid else f"{self._worker}/{pid}"

    def broker_queues(self) -> list[str]:
        """The broker's names of the crew's queues."""
        return self.crew.queues.broker_names()

    # ---- new runs ------------------------------------------------------------------------------
    def new_run(
        self, agent: Agent[Any, Any], task: Any, *, run_id: str = "", history: Sequence[Message] = (), stream: bool = False,
        origin: str = "",
    ) -> NewRun:  # fmt: skip
        """A new run of this agent, which has not begun.

        Raises:
            DefinitionError: the task is not of the agent's type, or the run id is malformed.
            UnknownName: the crew has no such agent.
        """
        return root_run(
            self.crew, self.process_state.dispatch, agent, task, run_id=run_id or uuid.uuid4().hex[:12],
            queue=self.crew.queues.broker_name(self.crew.queues.first), history=history,
            origin=origin or self.crew._file, stream=stream, trace=self._traceparent(),
        )  # fmt: skip

    async def begin(self, new: NewRun) -> Accepted:
        """Begin a run; repeated with the same spec it changes nothing.

        Raises:
            RunError: a run of this id exists with another agent or task.
        """
        answer = await self.process_state.begin(new)
        if isinstance(answer, Refused):
            raise RunError(
                f"run {new.run_id!r} already exists with another agent or task",
                hint=f"use another id, or see: agentmesh runs show {new.run_id}",
                run_id=new.run_id,
            )
        return answer

    def begin_for_canvas(
        self, agent: str, task: Any, run_id: str, saved: dict[str, Any], fields: dict[str, Any]
    ) -> Sequence[Event]:
        """Begin a run that a canvas waits for; returns () or, on an eager app, the events of the ended run."""
        instance = self.crew.agent(agent, fields)
        if instance.task_type is str and not isinstance(task, str):
            task = canonical(task)
        new = self.new_run(instance, task, run_id=run_id)
        if is_eager(self.app):
            run_sync(self.begin(new))
            return run_sync(self.journal.events(run_id))
        finish = self.dispatch.finish(run_id, agent, self.crew.queues.broker_name(self.crew.queues.first))
        run_sync(self.begin(replace(new, spec=replace(new.spec, canvas=saved), finish=finish)))
        return ()

    def begin_scheduled(self, name: str, now: datetime) -> str:
        """Begin the run of a schedule that is due; returns its id."""
        schedule = self.crew.schedules[name]
        new = self.new_run(schedule.agent, schedule.task, run_id=schedule.run_id(schedule.times.last(now)))
        run_sync(self.begin(new))
        return new.run_id

    # ---- leases --------------------------------------------------------------------------------
    def active_engine(self) -> Engine:
        """This process's engine, with the renewal of its leases started."""
        housekeeper = self.process_state.housekeeper
        if housekeeper is None:  # a child of a prefork pool: its parent sweeps
            housekeeper = self._start_housekeeping((), math.inf)
        housekeeper.wake()
        return self.process_state.engine

    def start_housekeeping(self, *, queues: Sequence[str] = ()) -> Housekeeper:
        """Renew leases and sweep in a thread of this process."""
        return self._start_housekeeping(queues or self.crew.queues.broker_names(), self.config.sweep_s)

    def _start_housekeeping(self, queues: Sequence[str], sweep_s: float) -> Housekeeper:
        state = self.process_state
        journal = make_journal(self.config, self.app, self._journal_source)
        housekeeper = Housekeeper(
            engines=[state.engine], journal=journal, worker=state.worker, queues=queues,
            lengths=None if getattr(journal, "pushes", False) else QueueLengths(self.app), ttl_s=self.config.lease_s,
            sweep_s=sweep_s,
        )  # fmt: skip
        state.housekeepers.append(housekeeper)
        housekeeper.start()
        return housekeeper

    def stop_housekeeping(self, housekeeper: Housekeeper | None = None) -> bool:
        """Stop one housekeeper, or all; whether none is left."""
        housekeepers = self.process_state.housekeepers
        for stopped in [housekeeper] if housekeeper is not None else list(housekeepers):
            housekeepers.remove(stopped)
            stopped.stop()
        return not housekeepers

    async def release_processes(self, pids: Sequence[int]) -> None:
        """Release the leases of these processes."""
        for pid in pids:
            await self.journal.release(self.lease_name(pid), crashed=False, queues=self.crew.queues.broker_names())

    def release_dead(self, pid: int) -> None:
        """Have the leases of a dead child process released by the housekeeper."""
        if self.process_state.housekeeper is not None and pid != os.getpid():
            self.process_state.housekeeper.release_dead(self.lease_name(pid))
