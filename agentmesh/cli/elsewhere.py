"""Steps of a command's run that are left to workers elsewhere: which, and what becomes of them when nobody is there."""

import math
import sys
import time
from collections.abc import Sequence

from agentmesh.boot import open_journal
from agentmesh.celery.app import make_app
from agentmesh.celery.seat import Command
from agentmesh.celery.takers import takers
from agentmesh.cli.child import spec_of
from agentmesh.cli.embedding import RAG
from agentmesh.cli.spares import OnDemand
from agentmesh.config import Config
from agentmesh.crew import Crew
from agentmesh.queue import EMBED

SAY_S, START_S = 4.0, 10.0  # without a taker for so long


def left(config: Config, path: str, crew: Crew, named: Sequence[str]) -> list[str]:
    """The queues whose steps workers elsewhere do: all but those named; of an ingest `embed`, where somebody takes from it.

    Args:
        named: the queues that the command's own workers shall serve; [] leaves it to us.
    """
    if named:
        return [queue for queue in crew.queues if queue not in named]
    if path != RAG or not takers(make_app(config.broker), crew.broker_queue(EMBED)):
        return []
    everything = " ".join(f"--queue {queue}" for queue in crew.queues)
    _say(f"embed steps are left to the worker that is there for them; here too with {everything}")
    return [EMBED]


def deserted(config: Config, path: str, crew: Crew, queues: Sequence[str], *, start: bool) -> "list[Deserted]":
    """For each of these queues, the worker for the case that nobody else serves it."""
    after_s = START_S if start else math.inf
    return [Deserted(config, path, crew, queue, start_s=after_s) for queue in queues]


class Deserted(OnDemand):
    """A worker for a queue that is left to workers elsewhere, when something waits there and they are gone.

    Args:
        start_s: without them for so long, it is started; infinite only says that steps wait.
    """

    def __init__(self, config: Config, path: str, crew: Crew, queue: str, *, start_s: float) -> None:
        # On the CPU: a device's worker may be on its way back, and has given out the device's memory.
        command: Command = spec_of(
            config, crews=[path], queues=[queue], concurrency=0, env={"CUDA_VISIBLE_DEVICES": ""},
            pool=crew.queues[queue].pool,
        )  # fmt: skip
        super().__init__(command, crew.broker_queues([queue]), lambda: open_journal(config)[1])
        self._app, self._path, self._queue, self._start_s = make_app(config.broker), path, queue, start_s
        self._since_s, self._said = math.inf, False

    def wanted(self) -> bool:
        """Whether something waits, and nobody has taken from the queue for a while; says so."""
        now = time.monotonic()
        if not super().wanted() or takers(self._app, self._queues[0]) != 0:
            self._since_s, self._said = math.inf, False
            return False
        self._since_s = min(self._since_s, now)
        if now - self._since_s >= self._start_s:
            _say(f"no worker takes {self._queue!r} steps; one is started here, on the CPU")
            return True
        if now - self._since_s >= SAY_S and not self._said:
            self._said = True
            _say(
                f"no worker takes {self._queue!r} steps ({self._queues[0]}); they wait for one: "
                f"agentmesh worker {self._path} --queue {self._queue}"
            )
        return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
