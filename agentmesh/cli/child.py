"""A worker process as the supervisor starts it: `python -m agentmesh.cli.child SPEC --worker-name N --ready-fd FD`.

SPEC is JSON: crews (files), queues (names), concurrency, config (settings), log (its form).
"""

import argparse
import gc
import json
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

from agentmesh.boot import counting, export_traces, load_crew
from agentmesh.celery.beat import start_beat
from agentmesh.celery.loop import drive
from agentmesh.celery.supervise import announce_ready, leave_with_parent
from agentmesh.cli.exits import exit_code, say_error
from agentmesh.config import Config
from agentmesh.crew import Crew
from agentmesh.errors import MeshError
from agentmesh.logs import Form, Logged, set_up
from agentmesh.mesh import InProcess, Mesh
from agentmesh.models.named import Models
from agentmesh.queue import POOLS


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until told to stop: SIGTERM drains, a second signal leaves at once."""
    set_up(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    leave_with_parent(config.drain_s)
    over = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        if over.is_set():
            sys.exit(128 + number)
        over.set()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's: it drains us with SIGTERM
    models = Models()
    workers: list[InProcess] = []
    crews = [load_crew(path) for path in spec["crews"]]
    export_traces()  # after the crews: one that sets the SDK up itself has its way
    sights = [Logged(), *counting()]
    for crew in crews:
        mesh = Mesh(crew, config=config, models=models, worker=name, sights=sights)
        mesh.app.conf.worker_send_task_events = bool(spec.get("events"))
        served = crew.queues_in("asyncio", spec["queues"])
        if served:
            workers.append(mesh.worker(queues=served, concurrency=spec["concurrency"]).start())
        if spec.get("beat") and mesh.crew.schedules:
            start_beat(mesh.app)
    spare_collector()
    if ready_fd is not None:
        announce_ready(ready_fd)
    over.wait()
    for worker in workers:
        worker.stop(grace_s=config.drain_s)
    drive(models.close())
    return 0


def spare_collector() -> None:
    """What is loaded by now stays, and is not looked through again; what comes is looked at more rarely.

    A thousand requests in flight are many live objects and few cycles: with the defaults the collector took a third of
    a worker's CPU (`bench/fanout.py`).
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def spec_of(
    config: Config, *, crews: list[str], queues: list[str], concurrency: int, beat: bool = False,
    log: Form | Literal[""] = "", events: bool = False,
) -> list[str]:  # fmt: skip
    """The command line that starts a worker for the asyncio queues among these, or among all."""
    spec = {
        "crews": crews,
        "queues": queues,
        "concurrency": concurrency,
        "beat": beat,
        "events": events,
        "config": config.model_dump(mode="json"),
    }
    if log:
        spec["log"] = log
    return [sys.executable, "-m", "agentmesh.cli.child", json.dumps(spec)]


def specs_of(
    config: Config, crews: Mapping[str, Crew], *, queues: Sequence[str] = (), concurrency: int = 0, processes: int = 1,
    beat: bool = False, log: Form | Literal[""] = "", events: bool = False,
) -> list[list[str]]:  # fmt: skip
    """The command lines of the workers for these crews, by the paths of their files: one for each pool their queues name.

    Args:
        concurrency: of the asyncio workers; of the prefork worker where there is no other.
        processes: how many asyncio workers.
    """
    found = [p for p in POOLS if any(crew.queues_in(p, queues) for crew in crews.values())]
    argvs: list[list[str]] = []
    for pool in found:
        argv = spec_of(
            config, crews=list(crews), queues=list(queues), beat=beat and not argvs, log=log, events=events,
            concurrency=concurrency if pool == found[0] else 0,
        )  # fmt: skip
        if pool == "prefork":
            argv[2] = "agentmesh.cli.pooled"
        argvs += [argv] * (processes if pool == "asyncio" else 1)
    return argvs


def as_program(work: Callable[..., int]) -> int:
    """Run a worker's `main` with the arguments of the command line; its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=json.loads)
    parser.add_argument("--worker-name", default="")
    parser.add_argument("--ready-fd", type=int)
    given = parser.parse_args()
    try:
        return work(given.spec, name=given.worker_name, ready_fd=given.ready_fd)
    except MeshError as error:
        say_error(error)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(as_program(main))
