"""Celery's own prefork worker as our supervisor runs it: a process a step, for `def` tools that compute.

A process in which a tool runs on after its time was up ends itself once the step's end is written and reported; one that
cannot even do that, because the tool holds the interpreter, is killed by its parent when the message's time limit is up.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from billiard.pool import EX_RECYCLE
from celery import Celery
from celery.apps import worker as program
from celery.concurrency import asynpool, prefork
from celery.exceptions import SecurityWarning
from celery.signals import setup_logging
from celery.utils.log import get_logger

from agentmesh.celery.consumer import MeshConsumer
from agentmesh.engine.executor import RUNNING_THREADS

logger = get_logger("agentmesh.prefork")


class _Process(asynpool.Worker):  # type: ignore[misc]  # celery is untyped
    """What runs in a process of the pool."""

    wait_for_job: Any  # billiard makes it anew in each process

    def on_loop_start(self, pid: int) -> None:
        super().on_loop_start(pid)
        wait = self.wait_for_job

        def wait_or_leave() -> Any:
            # Between two jobs: the last one is committed and reported, the next one not yet taken.
            if RUNNING_THREADS:
                logger.warning("a tool did not stop at its timeout; process %d exits, and the tool with it", pid)
                sys.exit(EX_RECYCLE)
            return wait()

        self.wait_for_job = wait_or_leave


class _Processes(asynpool.AsynPool):  # type: ignore[misc]  # celery is untyped
    Worker = _Process


class ProcessPool(prefork.TaskPool):  # type: ignore[misc]  # celery is untyped
    """Celery's prefork pool, whose processes do not outlive a tool that will not stop."""

    Pool = _Processes


def make_worker(app: Celery, *, queues: Sequence[str], concurrency: int, name: str) -> Any:
    """A worker program, to be started on the main thread: SIGTERM drains it.

    Args:
        queues: names of the broker's queues.
        concurrency: processes.
        name: the node name.
    """
    # Celery warns of root, for the sake of those who accept pickles; this app accepts JSON alone.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    setup_logging.connect(_logging_is_set_up)
    program.safe_say = _silent  # that it drains is for the supervisor to say
    return program.Worker(
        app=app, hostname=name, queues=list(queues), concurrency=concurrency, pool=ProcessPool,
        consumer_cls=MeshConsumer, prefetch_multiplier=1, optimization="fair", quiet=True,
        without_gossip=True, without_mingle=True, without_heartbeat=True,
    )  # fmt: skip


def _silent(*_: Any) -> None:
    """Celery prints "Warm shutdown" at the end of every worker program."""


def _logging_is_set_up(**_: Any) -> None:
    """Whoever listens to this signal keeps Celery from doing it."""
