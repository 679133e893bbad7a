"""A Celery worker in a thread of this process, for notebooks and `run()`; changes no signal handler, stdout or logging."""

import asyncio
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Self

from celery.bootsteps import CLOSE, RUN
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.utils.log import get_logger
from celery.worker import WorkController
from kombu.utils.url import maybe_sanitize_url

from agentmesh.celery.consumer import MeshConsumer, broker_error
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.housekeeping import Housekeeper
from agentmesh.celery.lanes import Lanes
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.celery.pool import CANCEL_S, TaskPool
from agentmesh.celery.rabbitmq import on_rabbit
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import ServerQueue, Suspects
from agentmesh.engine.blocking import refuse_on_event_loop
from agentmesh.errors import ConfigError, ServiceDown

logger = get_logger("agentmesh.embedded")

Admits = Callable[[int], int]
READY_TIMEOUT_S = 10.0
RESTART_S = 0.2  # a worker that ended unasked is replaced after this, doubled up to MAX_RESTART_S
MAX_RESTART_S = 5.0


class _Worker(WorkController):  # type: ignore[misc]  # Celery has no types
    has_housekeeping = True  # by the mesh that made it

    # Not celery.apps.worker.Worker, which takes stdout, the root logger and the signals.
    def __init__(self, app: Any, *, name: str, queues: Sequence[str], concurrency: int, admits: Admits | None) -> None:
        self.admits = admits
        self.ready = threading.Event()
        self.cause: BaseException | None = None
        super().__init__(
            app=app, hostname=name, queues=list(queues), concurrency=concurrency, pool=TaskPool,
            consumer_cls=MeshConsumer, prefetch_multiplier=1, use_eventloop=False,
            without_gossip=True, without_mingle=True, without_heartbeat=True,
        )  # fmt: skip

    def setup_queues(self, include: Sequence[str], exclude: Any = None) -> None:
        """Keep the queues here: two workers of one app would overwrite each other's in the app's registry."""
        self.own_queues = list(include)
        if not on_rabbit(self.app):
            super().setup_queues(include, exclude)

    def setup_includes(self, includes: Sequence[str]) -> None:
        """Do not write the modules of all tasks into the app's conf, which is for processes that we never start."""
        self.include = includes

    def on_consumer_ready(self, consumer: Any) -> None:
        self.ready.set()

    def work(self) -> None:
        """Work until the consumer's blueprint closes. The thread that started the bootsteps also stops them."""
        try:
            self.blueprint.start(self)
        except (WorkerShutdown, WorkerTerminate):
            pass
        except BaseException as error:  # Celery's own start() would only log it
            self.cause = error
        try:
            if self.blueprint.state == RUN:
                self.stop()
        except Exception as error:
            self.cause = self.cause or error
        unacked = getattr(getattr(self, "consumer", None), "unacked", None)
        if unacked is not None:
            unacked.waker.close()


class EmbeddedWorker:
    """A worker of `app` in a daemon thread; replaced when it ends unasked.

    Args:
        queues: names of the broker's queues.
        concurrency: how many steps may be in flight.
        name: the worker's node name; a unique one when empty.
        admits: returns how many more steps there is room for, given how many are in flight; None is only `concurrency`.
    """

    def __init__(
        self, app: Any, *, queues: Sequence[str], concurrency: int = 100, name: str = "", admits: Admits | None = None
    ) -> None:  # fmt: skip
        self._admits = admits
        self._app, self._queues, self._concurrency = app, tuple(queues), concurrency
        self.name = name or f"embedded-{os.getpid()}-{uuid.uuid4().hex[:6]}@{socket.gethostname()}"
        self._stopping = threading.Event()
        self._worker: _Worker | None = None
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        """Start, and return when it consumes; a second start does nothing.

        Raises:
            ServiceDown: the broker does not respond.
            ConfigError: it was not ready within 10 s.
        """
        if self.running:
            return
        error = broker_error(self._app, READY_TIMEOUT_S / 2)
        if error is not None:
            raise ServiceDown(
                f"no broker responds at {maybe_sanitize_url(self._app.conf.broker_url)} ({error})",
                hint="start one, or leave `broker` empty to use the embedded one",
            ) from error
        self._stopping.clear()
        worker = self._worker = self._make()
        self._thread = threading.Thread(target=self._run, args=(worker,), name="agentmesh-worker", daemon=True)
        self._thread.start()
        deadline = monotonic() + READY_TIMEOUT_S
        while not worker.ready.wait(0.02):
            if worker.cause is not None or monotonic() > deadline:
                self.stop(grace_s=0.0)
                raise ConfigError(
                    f"the worker in this process is not ready for {list(self._queues)!r} after {READY_TIMEOUT_S:.0f} s "
                    f"({worker.cause or 'no reason given'})",
                    hint="check the broker with `agentmesh doctor`",
                ) from worker.cause

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Wait up to `grace_s` for running steps, cancel the others and return; a second stop does nothing."""
        thread = self._thread
        if thread is None:
            return
        deadline = monotonic() + grace_s + CANCEL_S + READY_TIMEOUT_S
        while thread.is_alive() and monotonic() < deadline:
            self.stop_consuming(grace_s=grace_s)
            thread.join(0.02)
        if thread.is_alive():
            logger.error("the worker thread of %s did not stop; it ends with the process", self.name)
        self._thread = self._worker = None

    def stop_consuming(self, *, grace_s: float) -> None:
        """Take no more steps, and come back at once; `stop` waits for those that run."""
        self._stopping.set()
        worker = self._worker
        if worker is not None:
            worker.pool.grace_s = min(worker.pool.grace_s, grace_s)
            worker.consumer.blueprint.state = CLOSE
            worker.consumer.unblock()

    def _make(self) -> _Worker:
        return _Worker(
            self._app, name=self.name, queues=self._queues, concurrency=self._concurrency, admits=self._admits
        )

    def _run(self, worker: _Worker) -> None:
        restart_s = RESTART_S
        while True:
            started_s = monotonic()
            worker.work()
            if not worker.ready.is_set() or self._stopping.wait(restart_s):
                return
            logger.error("worker %s ended (%r); starting a new one", self.name, worker.cause)
            restart_s = RESTART_S if monotonic() - started_s > MAX_RESTART_S else min(2 * restart_s, MAX_RESTART_S)
            worker = self._worker = self._make()


# ---- The workers of a mesh in this process ------------------------------------------------------


class InProcessWorker:
    """Works for meshes of one Celery app; also usable as a context manager.

    Args:
        meshes: those whose leases it renews and whose outboxes it sweeps while it works.
        workers: one for all queues, or one for each group of queues that has its own places.
    """

    def __init__(self, meshes: Sequence[MeshRuntime], workers: Sequence[EmbeddedWorker]) -> None:
        self._runtimes, self._workers = list(meshes), list(workers)
        self._housekeepers: list[tuple[MeshRuntime, Housekeeper]] = []

    def start(self) -> Self:
        """Start, and return when it consumes."""
        for runtime in self._runtimes:
            runtime.check()
        try:
            for runtime in self._runtimes:
                # of all queues: it may be the one sweeper, also for workers of other queues
                self._housekeepers.append((runtime, runtime.start_housekeeping()))
            for worker in self._workers:
                worker.start()
        except BaseException:
            for worker in self._workers:
                worker.stop(grace_s=0.0)
            self._stop_housekeeping()
            raise
        return self

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Stop consuming, wait up to `grace_s` for running steps, cancel the others and release their leases."""
        for worker in self._workers:  # all first: none takes more while another drains
            worker.stop_consuming(grace_s=grace_s)
        for worker in self._workers:  # not in threads: an interpreter at its end refuses new ones
            worker.stop(grace_s=grace_s)
        for runtime in self._stop_housekeeping():
            run_sync(runtime.release_processes([os.getpid()]))

    def _stop_housekeeping(self) -> list[MeshRuntime]:
        """Stop our housekeeping; returns the meshes for which no other worker of this process works any more."""
        started, self._housekeepers = self._housekeepers, []
        return [runtime for runtime, housekeeper in started if runtime.stop_housekeeping(housekeeper)]

    def __enter__(self) -> Self:
        refuse_on_event_loop("with mesh.worker()", "async with mesh.worker()")
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.stop)


def in_process_worker(
    runtime: MeshRuntime, *, queues: Sequence[str] = (), concurrency: int = 0, admits: Admits | None = None
) -> InProcessWorker:
    """A worker for these queues of one crew, or for all; see `make_workers`."""
    workers = make_workers(
        runtime.app, runtime.crew, queues, concurrency=concurrency, suspects=runtime.suspects, admits=admits
    )
    return InProcessWorker([runtime], workers)


def make_workers(
    app: Any, crew: Crew, queues: Sequence[str] = (), *, concurrency: int = 0, suspects: Suspects = "include",
    admits: Admits | None = None,
) -> list[EmbeddedWorker]:  # fmt: skip
    """The workers of a crew's queues: one, and one more for each group of queues in front of the same servers.

    Args:
        concurrency: of each; 0 is what the queues declare.
        admits: room that all of them share; then it is one worker.
    """
    workers = []
    for group in [list(queues)] if admits is not None else crew.queues.worker_groups(queues):
        declared = [crew.queues[name] for name in group or crew.queues]
        server_queues = [q for q in declared if admits is None and isinstance(q, ServerQueue)]
        places = concurrency or (max if server_queues else sum)(q.concurrency for q in declared)
        broker_queues = crew.queues.broker_names(group, suspects=suspects)
        if broker_queues:
            lanes = {crew.queues.broker_name(q.name): q.lane for q in server_queues}
            room = _lanes(lanes, places) if len({*lanes.values()}) > 1 else admits
            workers.append(EmbeddedWorker(app, queues=broker_queues, concurrency=places, admits=room))
    return workers


def _lanes(lanes: Mapping[str, str], places: int) -> Lanes:
    return Lanes(lanes, lambda in_flight: places - in_flight)
