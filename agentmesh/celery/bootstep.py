"""The bootstep that makes any Celery worker of an app a worker of its crews; added to the app, not to its conf."""

import asyncio
import os
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_shutdown
from celery.utils.log import get_logger

from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.celery.rabbitmq import declare_as_ours, on_rabbit
from agentmesh.celery.tasks import StepTask
from agentmesh.errors import MeshError

logger = get_logger("agentmesh.worker")

RELEASE_TIMEOUT_S = 3.0


class HousekeepingStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Renews leases and sweeps in a worker's main process, for the crews whose queues it consumes.

    Children of a prefork pool hold leases of their own, which they renew; the main process learns when one dies.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        self.meshes: list[MeshRuntime] = []
        self._pids: list[int] = []
        super().__init__(worker, **kwargs)

    def include_if(self, worker: Any) -> bool:
        """Not in an embedded worker, whose mesh does its own housekeeping."""
        return not getattr(worker, "has_housekeeping", False)

    def start(self, worker: Any) -> None:
        """Start housekeeping, once the processes of the pool run."""
        consumed = set(worker.app.amqp.queues.consume_from)
        for runtime in worker.app.tasks[StepTask.name].meshes.values():
            if queues := consumed.intersection(runtime.broker_queues()):
                for queue in queues if on_rabbit(worker.app) else ():
                    declare_as_ours(worker.app.amqp.queues[queue])
                runtime.start_housekeeping()
                self.meshes.append(runtime)
                logger.info("housekeeping for crew %r as %s", runtime.crew.name, runtime.lease_name(os.getpid()))
        # The pool drains after this step's `stop`, and its leases must be renewed until it has ended.
        worker_shutdown.connect(self._on_shutdown, sender=worker)

    def close(self, worker: Any) -> None:
        """Note the processes of the pool, which is about to drain."""
        self._pids = [pid for pid in worker.pool.info.get("processes", ()) if isinstance(pid, int)]

    def stop(self, worker: Any) -> None:
        """Nothing: housekeeping ends after the drain; see `start`."""

    def terminate(self, worker: Any) -> None:
        """A cold shutdown: interrupted steps are retried elsewhere when their leases have expired."""
        for runtime in self.meshes:
            runtime.stop_housekeeping()

    def _on_shutdown(self, **_: Any) -> None:
        for runtime in self.meshes:
            runtime.stop_housekeeping()
            try:
                run_sync(asyncio.wait_for(runtime.release_processes([os.getpid(), *self._pids]), RELEASE_TIMEOUT_S))
            except (OSError, MeshError) as e:
                logger.warning("could not release the worker's leases (%s); they expire on their own", e)


def add_bootstep(app: Celery) -> None:
    """Give every worker of this app the step; the app's conf is not touched."""
    app.steps["worker"].add(HousekeepingStep)
