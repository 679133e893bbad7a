"""Celery's own prefork worker as our supervisor runs it: a process a step, for `def` tools that compute.

A process whose tool does not stop at its timeout exits once the step's end is committed and reported. One whose tool holds
the interpreter cannot do that; its parent kills it at the message's time limit.
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


class _PoolProcess(asynpool.Worker):  # type: ignore[misc]  # celery is untyped
    """The loop of a process of the pool."""

    wait_for_job: Any  # billiard sets it in each process

    def on_loop_start(self, pid: int) -> None:
        super().on_loop_start(pid)
        wait = self.wait_for_job

        def wait_or_exit() -> Any:
            # Between two jobs: the last one is committed and reported, the next one is not taken yet.
            if RUNNING_THREADS:
                logger.warning("a tool did not stop at its timeout; process %d exits, and the tool with it", pid)
                sys.exit(EX_RECYCLE)
            return wait()

        self.wait_for_job = wait_or_exit


class _Processes(asynpool.AsynPool):  # type: ignore[misc]  # celery is untyped
    Worker = _PoolProcess


class ProcessPool(prefork.TaskPool):  # type: ignore[misc]  # celery is untyped
    """Celery's prefork pool, whose processes exit after a tool that does not stop at its timeout."""

    Pool = _Processes


def make_worker(app: Celery, *, queues: Sequence[str], concurrency: int, name: str) -> Any:
    """A worker program, to be started on the main thread: SIGTERM drains it.

    Args:
        queues: names of the broker's queues.
        concurrency: processes.
        name: the node name.
    """
    # Celery warns of running as root because of pickles; this app accepts only JSON.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    setup_logging.connect(_keep_logging)
    program.safe_say = _silent  # the supervisor logs the drain
    return program.Worker(
        app=app, hostname=name, queues=list(queues), concurrency=concurrency, pool=ProcessPool,
        consumer_cls=MeshConsumer, prefetch_multiplier=1, optimization="fair", quiet=True,
        without_gossip=True, without_mingle=True, without_heartbeat=True,
    )  # fmt: skip


def _silent(*_: Any) -> None:
    """Print nothing: Celery prints "Warm shutdown" at the end of every worker program."""


def _keep_logging(**_: Any) -> None:
    """Do nothing: with a receiver of this signal Celery does not set up logging."""
