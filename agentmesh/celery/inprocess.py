"""A worker in this process, for a while: consumers in threads of theirs, and the tenders of the meshes they work for."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from agentmesh.celery.embedded import Admits, EmbeddedWorker
from agentmesh.celery.lanes import Lanes
from agentmesh.celery.loop import drive
from agentmesh.celery.sweep import Tender
from agentmesh.celery.tasks import Home
from agentmesh.crew import Crew
from agentmesh.queue import Suspects


class InProcess:
    """Works for meshes of one Celery app; also usable as a context manager.

    Args:
        homes: the meshes, whose crews' leases are renewed and whose outboxes are swept meanwhile.
        workers: one for all queues, or one for each group of queues that has places of its own.
    """

    def __init__(self, homes: Sequence[Home], workers: Sequence[EmbeddedWorker]) -> None:
        self._homes, self._workers = list(homes), list(workers)
        self._tenders: list[tuple[Home, Tender]] = []

    def start(self) -> Self:
        """Returns when it consumes."""
        for home in self._homes:
            home.check()
        try:
            for home in self._homes:
                # all queues: it may be the one sweeper, also for workers that serve others
                self._tenders.append((home, home.tend()))
            for worker in self._workers:
                worker.start()
        except BaseException:
            for worker in self._workers:
                worker.stop(grace_s=0.0)
            self._untend()
            raise
        return self

    def stop(self, *, grace_s: float = 5.0) -> None:
        """Stop consuming and let steps end for up to `grace_s`; what is cut off is given back."""
        # at once: none takes more while another drains
        with ThreadPoolExecutor(max(1, len(self._workers))) as stopping:
            for done in [stopping.submit(worker.stop, grace_s=grace_s) for worker in self._workers]:
                done.result()
        for home in self._untend():
            drive(home.leave([os.getpid()]))

    def _untend(self) -> list[Home]:
        """Those for which no other worker of this process works: what they still hold is given back."""
        tended, self._tenders = self._tenders, []
        return [home for home, tender in tended if home.untend(tender)]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()


def embedded(
    app: Any, crew: Crew, queues: Sequence[str] = (), *, concurrency: int = 0, suspects: Suspects = "too",
    admits: Admits | None = None,
) -> list[EmbeddedWorker]:  # fmt: skip
    """The workers of a crew's queues: one, and one more for each group of queues that stand in front of the same servers.

    Args:
        concurrency: of each; 0 is as the queues say.
        admits: what all of them share; then it is one worker.
    """
    made = []
    for group in [list(queues)] if admits is not None else crew.groups(queues):
        declared = [crew.queues[name] for name in group or crew.queues]
        of_servers = admits is None and bool(declared[0].url)
        most = concurrency or (max if of_servers else sum)(q.concurrency for q in declared)
        named = crew.broker_queues(group, suspects=suspects)
        if named:
            lanes = {crew.broker_queue(q.name): q.lane for q in declared}
            room = _lanes(lanes, most) if of_servers and len({*lanes.values()}) > 1 else admits
            made.append(EmbeddedWorker(app, queues=named, concurrency=most, admits=room))
    return made


def _lanes(lanes: Mapping[str, str], places: int) -> Lanes:
    return Lanes(lanes, lambda in_hand: places - in_hand)
