"""A worker process as the supervisor starts it: `python -m agentmesh.worker.asyncio_worker --worker-name N --ready-fd FD`.

What it does is a JSON object in the environment, where no other user can read the broker's password: crews (files),
queues (names), concurrency, config (settings), log (its format), suspects (queue.Suspects).
"""

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

from agentmesh.celery.beat import start_beat
from agentmesh.celery.embedded import InProcessWorker, in_process_worker
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.config import Config
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import POOLS, Suspects, WorkerKind
from agentmesh.errors import MeshError
from agentmesh.mesh import make_runtime
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.logs import Form, LogObserver, set_up_logging
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.optional import metrics_observers, set_up_tracing
from agentmesh.runtime.process_exit import exit_code, print_error, skip_final_collection
from agentmesh.worker.gpus import device_env, devices_of
from agentmesh.worker.process import Command, announce_ready, exit_with_parent

SPEC_ENV = "AGENTMESH_WORKER_SPEC"
IDLE_EXIT_S = 10.0  # a worker for suspects exits when there was none for so long
IDLE_POLL_S = 1.0


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until stopped: SIGTERM drains, a second signal exits at once."""
    set_up_logging(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    exit_with_parent(config.drain_s)
    over = stop_event()
    models = ModelRegistry()
    workers: list[InProcessWorker] = []
    suspects_of: list[tuple[MeshRuntime, list[str]]] = []
    suspects: Suspects = spec.get("suspects", "include")
    crews = [load_crew(path) for path in spec["crews"]]
    set_up_tracing()  # after the crews: the SDK setup of a crew file comes first
    observers = [LogObserver(), *metrics_observers()]
    for crew in crews:
        runtime = make_runtime(crew, config=config, models=models, worker=name, observers=observers, suspects=suspects)
        runtime.app.conf.worker_send_task_events = bool(spec.get("events"))
        served = crew.queues.served_by("asyncio", spec["queues"])
        if served and (suspect_queues := crew.queues.broker_names(served, suspects=suspects)):
            suspects_of.append((runtime, suspect_queues))
            workers.append(in_process_worker(runtime, queues=served, concurrency=spec["concurrency"]).start())
        if spec.get("beat") and crew.schedules:
            start_beat(runtime.app)
    tune_garbage_collector()
    if ready_fd is not None:
        announce_ready(ready_fd)
    if suspects == "only":
        wait_until_idle(
            over,
            lambda: any(runtime.engine.leases or has_waiting_steps(runtime, queues) for runtime, queues in suspects_of),
        )
    else:
        over.wait()
    for worker in workers:
        worker.stop(grace_s=config.drain_s)
    run_sync(models.close())
    return 0


def stop_event() -> threading.Event:
    """Set by the first SIGTERM; the second exits at once."""
    over = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if over.is_set():
            sys.exit(128 + number)
        over.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which drains us with SIGTERM
    return over


def tune_garbage_collector() -> None:
    """Exempt what is loaded by now from collection, and collect new objects less often.

    A thousand requests in flight are many live objects and few cycles: with the defaults the collector took a third of
    a worker's CPU (`bench/fanout.py`).
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def wait_until_idle(over: threading.Event, is_busy: Callable[[], object]) -> None:
    """Return when `over` is set, or when this worker was idle for ten seconds."""
    busy_s = time.monotonic()
    while not over.wait(IDLE_POLL_S) and time.monotonic() - busy_s < IDLE_EXIT_S:
        if is_busy():
            busy_s = time.monotonic()


def has_waiting_steps(runtime: MeshRuntime, queues: Sequence[str]) -> bool:
    """Whether an entry waits in these broker queues; True also when the journal does not respond."""
    try:
        return run_sync(asyncio.wait_for(runtime.journal.queued(queues), IDLE_POLL_S)) > 0
    except (TimeoutError, OSError, MeshError):
        return True


def worker_command(
    config: Config, *, crews: list[str], queues: list[str], concurrency: int, beat: bool = False,
    log: Form | Literal[""] = "", events: bool = False, suspects: Suspects = "include", pool: WorkerKind = "asyncio",
    model: str = "", env: Mapping[str, str] | None = None,
) -> Command:  # fmt: skip
    """The command that starts one worker process.

    Args:
        queues: names of queues, of which it serves those of its kind; [] is all.
        pool: the kind of worker.
        model: of a device worker: what it loads.
    """
    spec = {
        "crews": crews,
        "queues": queues,
        "concurrency": concurrency,
        "beat": beat,
        "events": events,
        "suspects": suspects,
        "model": model,
        "config": config.model_dump(mode="json"),
    }
    if log:
        spec["log"] = log
    program = {"asyncio": "asyncio_worker", "prefork": "prefork_worker", "device": "gpu_worker"}[pool]
    return Command((sys.executable, "-m", f"agentmesh.worker.{program}"), {**(env or {}), SPEC_ENV: json.dumps(spec)})


def worker_commands(
    config: Config, crews: Mapping[str, Crew], *, queues: Sequence[str] = (), concurrency: int = 0, processes: int = 1,
    beat: bool = False, log: Form | Literal[""] = "", events: bool = False, suspects: Suspects = "include",
) -> list[Command]:  # fmt: skip
    """The commands of the workers for these crews: one for each pool that their queues name, and one for each model and
    device.

    Args:
        crews: by the path of their file.
        concurrency: of the asyncio workers; of the prefork worker where there is no other.
        processes: how many asyncio workers.
    """
    pools = [p for p in POOLS if any(crew.queues.served_by(p, queues) for crew in crews.values())]
    commands: list[Command] = []
    for pool in pools:
        command = worker_command(
            config, crews=list(crews), queues=list(queues), beat=beat and not commands, log=log, events=events,
            concurrency=concurrency if pool == pools[0] else 0, suspects=suspects, pool=pool,
        )  # fmt: skip
        commands += [command] * (processes if pool == "asyncio" else 1)
    for (model, device), paths in _crews_by_device(crews, queues).items():
        commands.append(worker_command(
            config, crews=paths, queues=list(queues), beat=beat and not commands, log=log, events=events,
            concurrency=0 if pools else concurrency, suspects=suspects, pool="device", model=model, env=device_env(device),
        ))  # fmt: skip
    return commands


def _crews_by_device(crews: Mapping[str, Crew], queues: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """The files of the crews that need a worker, by its model and device."""
    by_device: dict[tuple[str, str], list[str]] = {}
    for path, crew in crews.items():
        for queue in crew.queues.on_devices(queues):
            for device in devices_of(queue):
                paths = by_device.setdefault((queue.model, device), [])
                paths += [path] if path not in paths else []
    return by_device


def take_spec() -> dict[str, Any]:
    """What this process was started to do; removed from the environment, which child processes inherit."""
    spec: dict[str, Any] = json.loads(os.environ.pop(SPEC_ENV))
    return spec


def run_as_program(work: Callable[..., int]) -> int:
    """Run a worker's `main` with the arguments of its command line; returns its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker-name", default="")
    parser.add_argument("--ready-fd", type=int)
    options = parser.parse_args()
    skip_final_collection()
    try:
        return work(take_spec(), name=options.worker_name, ready_fd=options.ready_fd)
    except MeshError as error:
        print_error(error)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(run_as_program(main))
