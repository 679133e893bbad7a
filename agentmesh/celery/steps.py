"""What makes any Celery worker of an app a worker of its crews: a bootstep, added to the app and not to its conf."""

import asyncio
import os
from typing import Any

from celery import Celery, bootsteps
from celery.signals import worker_shutdown
from celery.utils.log import get_logger

from agentmesh.celery.loop import drive
from agentmesh.celery.rabbit import make_ours, on_rabbit
from agentmesh.celery.tasks import Home, StepTask
from agentmesh.errors import MeshError

logger = get_logger("agentmesh.worker")

LEAVE_S = 3.0


class TendStep(bootsteps.StartStopStep):  # type: ignore[misc]  # celery is untyped
    """Renews and sweeps in a worker's main process, for the crews whose queues it consumes.

    Children of a prefork pool hold leases of their own, which they renew; the main process hears when one dies.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        self.homes: list[Home] = []
        self._pids: list[int] = []
        super().__init__(worker, **kwargs)

    def include_if(self, worker: Any) -> bool:
        """Not in the worker thread of a mesh's own, which brings its tender along."""
        return not getattr(worker, "is_tended", False)

    def start(self, worker: Any) -> None:
        """Once the pool's processes are there."""
        consumed = set(worker.app.amqp.queues.consume_from)
        for home in worker.app.tasks[StepTask.name].homes.values():
            if ours := consumed.intersection(home.serves()):
                for queue in ours if on_rabbit(worker.app) else ():
                    make_ours(worker.app.amqp.queues[queue])
                home.tend()
                self.homes.append(home)
                logger.info("tending crew %r as %s", home.crew.name, home.name_of(os.getpid()))
        # The pool drains after this step's `stop`: whoever renews its leases must outlive it.
        worker_shutdown.connect(self._ended, sender=worker)

    def close(self, worker: Any) -> None:
        """The pool is about to drain."""
        self._pids = [pid for pid in worker.pool.info.get("processes", ()) if isinstance(pid, int)]

    def stop(self, worker: Any) -> None:
        """Nothing yet; see `start`."""

    def terminate(self, worker: Any) -> None:
        """A cold shutdown: what is cut off goes on elsewhere when its lease has run out."""
        for home in self.homes:
            home.untend()

    def _ended(self, **_: Any) -> None:
        for home in self.homes:
            home.untend()
            try:
                drive(asyncio.wait_for(home.leave([os.getpid(), *self._pids]), LEAVE_S))
            except (OSError, MeshError) as e:
                logger.warning("what the worker held could not be given back (%s); its leases run out by themselves", e)


def attach(app: Celery) -> None:
    """Every worker of this app tends from now on; the app's conf is not touched."""
    app.steps["worker"].add(TendStep)
