"""A worker in this process, for a while: consumers in threads of theirs, and the tenders of the meshes they work for."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from agentmesh.celery.embedded import EmbeddedWorker
from agentmesh.celery.loop import drive
from agentmesh.celery.tasks import Home


class InProcess:
    """Works for meshes of one Celery app; also usable as a context manager.

    Args:
        homes: the meshes, whose crews' leases are renewed and whose outboxes are swept meanwhile.
        workers: one for all queues, or one for each group of queues that has places of its own.
    """

    def __init__(self, homes: Sequence[Home], workers: Sequence[EmbeddedWorker]) -> None:
        self._homes, self._workers = list(homes), list(workers)

    def start(self) -> Self:
        """Returns when it consumes."""
        for home in self._homes:
            home.check()
        for home in self._homes:
            home.tend()  # all queues: it may be the one sweeper, also for workers that serve others
        for worker in self._workers:
            worker.start()
        return self

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Stop consuming and let steps end for up to `grace_s`; what is cut off is given back."""
        with ThreadPoolExecutor(
            max(1, len(self._workers))
        ) as stopping:  # at once: none takes more while another drains
            for done in [stopping.submit(worker.stop, grace_s=grace_s) for worker in self._workers]:
                done.result()
        for home in self._homes:
            home.untend()
            drive(home.leave([os.getpid()]))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()
