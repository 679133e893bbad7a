"""A worker process as the supervisor starts it: `python -m agentmesh.cli.child --worker-name N --ready-fd FD`.

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

from agentmesh.boot import counting, export_traces, load_crew
from agentmesh.celery.beat import start_beat
from agentmesh.celery.inprocess import InProcess
from agentmesh.celery.loop import drive
from agentmesh.celery.offspring import announce_ready, leave_with_parent
from agentmesh.celery.seat import Command
from agentmesh.cli.devices import device_env, devices_of
from agentmesh.cli.exits import end_quickly, exit_code, say_error
from agentmesh.config import Config
from agentmesh.crew import Crew
from agentmesh.errors import MeshError
from agentmesh.logs import Form, Logged, set_up
from agentmesh.mesh import Mesh
from agentmesh.models.named import Models
from agentmesh.queue import POOLS, Suspects

SPEC_IN = "AGENTMESH_WORKER_SPEC"
UNWANTED_S = 10.0  # a worker for suspects leaves when for so long there was none
LOOK_S = 1.0


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until told to stop: SIGTERM drains, a second signal leaves at once."""
    set_up(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    leave_with_parent(config.drain_s)
    over = told_to_stop()
    models = Models()
    workers: list[InProcess] = []
    watched: list[tuple[Mesh, list[str]]] = []
    suspects: Suspects = spec.get("suspects", "too")
    crews = [load_crew(path) for path in spec["crews"]]
    export_traces()  # after the crews: one that sets the SDK up itself has its way
    sights = [Logged(), *counting()]
    for crew in crews:
        mesh = Mesh(crew, config=config, models=models, worker=name, sights=sights, suspects=suspects)
        mesh.app.conf.worker_send_task_events = bool(spec.get("events"))
        served = crew.queues_in("asyncio", spec["queues"])
        if served and (beside := crew.broker_queues(served, suspects=suspects)):
            watched.append((mesh, beside))
            workers.append(mesh.worker(queues=served, concurrency=spec["concurrency"]).start())
        if spec.get("beat") and mesh.crew.schedules:
            start_beat(mesh.app)
    spare_collector()
    if ready_fd is not None:
        announce_ready(ready_fd)
    if suspects == "only":
        until_unwanted(over, lambda: any(mesh.engine.leases or waiting(mesh, queues) for mesh, queues in watched))
    else:
        over.wait()
    for worker in workers:
        worker.stop(grace_s=config.drain_s)
    drive(models.close())
    return 0


def told_to_stop() -> threading.Event:
    """Set by the first SIGTERM; the second leaves at once."""
    over = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if over.is_set():
            sys.exit(128 + number)
        over.set()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's: it drains us with SIGTERM
    return over


def spare_collector() -> None:
    """What is loaded by now stays, and is not looked through again; what comes is looked at more rarely.

    A thousand requests in flight are many live objects and few cycles: with the defaults the collector took a third of
    a worker's CPU (`bench/fanout.py`).
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def until_unwanted(over: threading.Event, wanted: Callable[[], object]) -> None:
    """Come back when told to stop, or when nobody wanted this worker for ten seconds."""
    last = time.monotonic()
    while not over.wait(LOOK_S) and time.monotonic() - last < UNWANTED_S:
        if wanted():
            last = time.monotonic()


def waiting(mesh: Mesh, queues: Sequence[str]) -> bool:
    """Whether an entry waits in these broker queues; also when the journal does not say."""
    try:
        return drive(asyncio.wait_for(mesh.journal.queued(queues), LOOK_S)) > 0
    except (TimeoutError, OSError, MeshError):
        return True


def spec_of(
    config: Config, *, crews: list[str], queues: list[str], concurrency: int, beat: bool = False,
    log: Form | Literal[""] = "", events: bool = False, suspects: Suspects = "too", pool: str = "asyncio",
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
    program = {"asyncio": "child", "prefork": "pooled", "device": "device"}[pool]
    return Command((sys.executable, "-m", f"agentmesh.cli.{program}"), {**(env or {}), SPEC_IN: json.dumps(spec)})


def specs_of(
    config: Config, crews: Mapping[str, Crew], *, queues: Sequence[str] = (), concurrency: int = 0, processes: int = 1,
    beat: bool = False, log: Form | Literal[""] = "", events: bool = False, suspects: Suspects = "too",
) -> list[Command]:  # fmt: skip
    """The commands of the workers for these crews, by the paths of their files: one for each pool their queues name, and
    one for each model and device.

    Args:
        concurrency: of the asyncio workers; of the prefork worker where there is no other.
        processes: how many asyncio workers.
    """
    found = [p for p in POOLS if any(crew.queues_in(p, queues) for crew in crews.values())]
    commands: list[Command] = []
    for pool in found:
        command = spec_of(
            config, crews=list(crews), queues=list(queues), beat=beat and not commands, log=log, events=events,
            concurrency=concurrency if pool == found[0] else 0, suspects=suspects, pool=pool,
        )  # fmt: skip
        commands += [command] * (processes if pool == "asyncio" else 1)
    for (model, device), paths in _on_devices(crews, queues).items():
        commands.append(spec_of(
            config, crews=paths, queues=list(queues), beat=beat and not commands, log=log, events=events,
            concurrency=0 if found else concurrency, suspects=suspects, pool="device", model=model, env=device_env(device),
        ))  # fmt: skip
    return commands


def _on_devices(crews: Mapping[str, Crew], queues: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Which crews' files want a worker for which model on which device."""
    found: dict[tuple[str, str], list[str]] = {}
    for path, crew in crews.items():
        for name in crew.queues_in("device", queues):
            for device in devices_of(crew.queues[name]):
                paths = found.setdefault((crew.queues[name].model, device), [])
                paths += [path] if path not in paths else []
    return found


def taken_spec() -> dict[str, Any]:
    """What this process was started to do; from here on not in its environment, which what it starts inherits."""
    spec: dict[str, Any] = json.loads(os.environ.pop(SPEC_IN))
    return spec


def as_program(work: Callable[..., int]) -> int:
    """Run a worker's `main` with the arguments of its command; its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker-name", default="")
    parser.add_argument("--ready-fd", type=int)
    given = parser.parse_args()
    end_quickly()
    try:
        return work(taken_spec(), name=given.worker_name, ready_fd=given.ready_fd)
    except MeshError as error:
        say_error(error)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(as_program(main))
