"""A worker process as the supervisor starts it: `python -m agentmesh.worker.asyncio_worker --worker-name N --ready-fd FD`.

What it shall do stands as JSON in the environment, where no other user can read the broker's password: crews (files),
queues (names), concurrency, config (settings), log (its form), suspects (queue.Suspects).
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
from agentmesh.celery.embedded import InProcessWorker
from agentmesh.celery.event_loop import run_sync
from agentmesh.config import Config
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import POOLS, Suspects
from agentmesh.errors import MeshError
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.logs import Form, LogObserver, set_up_logging
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.optional import metrics_observers, set_up_tracing
from agentmesh.runtime.process_exit import exit_code, print_error, skip_final_collection
from agentmesh.worker.gpus import device_env, devices_of
from agentmesh.worker.process import Command, announce_ready, exit_with_parent

SPEC_ENV = "AGENTMESH_WORKER_SPEC"
IDLE_EXIT_S = 10.0  # a worker for suspects leaves when for so long there was none
POLL_S = 1.0


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until told to stop: SIGTERM drains, a second signal leaves at once."""
    set_up_logging(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    exit_with_parent(config.drain_s)
    over = stop_event()
    models = ModelRegistry()
    workers: list[InProcessWorker] = []
    watched: list[tuple[Mesh, list[str]]] = []
    suspects: Suspects = spec.get("suspects", "include")
    crews = [load_crew(path) for path in spec["crews"]]
    set_up_tracing()  # after the crews: one that sets the SDK up itself has its way
    sights = [LogObserver(), *metrics_observers()]
    for crew in crews:
        mesh = Mesh(crew, config=config, models=models, worker=name, observers=sights, suspects=suspects)
        mesh.app.conf.worker_send_task_events = bool(spec.get("events"))
        served = crew.queues.of_pool("asyncio", spec["queues"])
        if served and (suspect_queues := crew.queues.broker_names(served, suspects=suspects)):
            watched.append((mesh, suspect_queues))
            workers.append(mesh.worker(queues=served, concurrency=spec["concurrency"]).start())
        if spec.get("beat") and mesh.crew.schedules:
            start_beat(mesh.app)
    tune_garbage_collector()
    if ready_fd is not None:
        announce_ready(ready_fd)
    if suspects == "only":
        wait_until_idle(
            over, lambda: any(mesh.engine.leases or has_waiting_steps(mesh, queues) for mesh, queues in watched)
        )
    else:
        over.wait()
    for worker in workers:
        worker.stop(grace_s=config.drain_s)
    run_sync(models.close())
    return 0


def stop_event() -> threading.Event:
    """Set by the first SIGTERM; the second leaves at once."""
    over = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if over.is_set():
            sys.exit(128 + number)
        over.set()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's: it drains us with SIGTERM
    return over


def tune_garbage_collector() -> None:
    """What is loaded by now stays, and is not looked through again; what comes is looked at more rarely.

    A thousand requests in flight are many live objects and few cycles: with the defaults the collector took a third of
    a worker's CPU (`bench/fanout.py`).
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def wait_until_idle(over: threading.Event, wanted: Callable[[], object]) -> None:
    """Come back when told to stop, or when nobody wanted this worker for ten seconds."""
    last = time.monotonic()
    while not over.wait(POLL_S) and time.monotonic() - last < IDLE_EXIT_S:
        if wanted():
            last = time.monotonic()


def has_waiting_steps(mesh: Mesh, queues: Sequence[str]) -> bool:
    """Whether an entry waits in these broker queues; also when the journal does not say."""
    try:
        return run_sync(asyncio.wait_for(mesh.journal.queued(queues), POLL_S)) > 0
    except (TimeoutError, OSError, MeshError):
        return True


def worker_command(
    config: Config, *, crews: list[str], queues: list[str], concurrency: int, beat: bool = False,
    log: Form | Literal[""] = "", events: bool = False, suspects: Suspects = "include", pool: str = "asyncio",
    model: str = "", env: Mapping[str, str] | None = None,
) -> Command:  # fmt: skip
    """The command that starts a worker for this pool's queues among these, or among all."""
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
    """The commands of the workers for these crews, by the paths of their files: one for each pool their queues name, and
    one for each model and device.

    Args:
        concurrency: of the asyncio workers; of the prefork worker where there is no other.
        processes: how many asyncio workers.
    """
    pools = [p for p in POOLS if any(crew.queues.of_pool(p, queues) for crew in crews.values())]
    commands: list[Command] = []
    for pool in pools:
        command = worker_command(
            config, crews=list(crews), queues=list(queues), beat=beat and not commands, log=log, events=events,
            concurrency=concurrency if pool == pools[0] else 0, suspects=suspects, pool=pool,
        )  # fmt: skip
        commands += [command] * (processes if pool == "asyncio" else 1)
    for (model, device), paths in _on_devices(crews, queues).items():
        commands.append(worker_command(
            config, crews=paths, queues=list(queues), beat=beat and not commands, log=log, events=events,
            concurrency=0 if pools else concurrency, suspects=suspects, pool="device", model=model, env=device_env(device),
        ))  # fmt: skip
    return commands


def _on_devices(crews: Mapping[str, Crew], queues: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Which crews' files want a worker for which model on which device."""
    by_device: dict[tuple[str, str], list[str]] = {}
    for path, crew in crews.items():
        for name in crew.queues.of_pool("device", queues):
            for device in devices_of(crew.queues[name]):
                paths = by_device.setdefault((crew.queues[name].model, device), [])
                paths += [path] if path not in paths else []
    return by_device


def take_spec() -> dict[str, Any]:
    """What this process was started to do; from here on not in its environment, which what it starts inherits."""
    spec: dict[str, Any] = json.loads(os.environ.pop(SPEC_ENV))
    return spec


def run_as_program(work: Callable[..., int]) -> int:
    """Run a worker's `main` with the arguments of its command; its exit code."""
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
