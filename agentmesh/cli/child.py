"""A worker process as the supervisor starts it: `python -m agentmesh.cli.child SPEC --worker-name N --ready-fd FD`.

SPEC is JSON: crews (files), queues (names), concurrency, config (settings), log (its form).
"""

import argparse
import json
import signal
import sys
import threading
from types import FrameType
from typing import Any, Literal

from agentmesh.boot import counting, export_traces, load_crew
from agentmesh.celery.beat import start_beat
from agentmesh.celery.loop import drive
from agentmesh.celery.supervise import announce_ready, leave_with_parent
from agentmesh.cli.exits import exit_code, say_error
from agentmesh.config import Config
from agentmesh.errors import MeshError
from agentmesh.logs import Form, Logged, set_up
from agentmesh.mesh import InProcess, Mesh
from agentmesh.models.named import Models


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
        workers.append(mesh.worker(queues=spec["queues"], concurrency=spec["concurrency"]).start())
        if spec.get("beat") and mesh.crew.schedules:
            start_beat(mesh.app)
    if ready_fd is not None:
        announce_ready(ready_fd)
    over.wait()
    for worker in workers:
        worker.stop(grace_s=config.drain_s)
    drive(models.close())
    return 0


def spec_of(
    config: Config, *, crews: list[str], queues: list[str], concurrency: int, beat: bool = False,
    log: Form | Literal[""] = "",
) -> list[str]:  # fmt: skip
    """The command line that starts this worker."""
    spec = {
        "crews": crews,
        "queues": queues,
        "concurrency": concurrency,
        "beat": beat,
        "config": config.model_dump(mode="json"),
    }
    if log:
        spec["log"] = log
    return [sys.executable, "-m", "agentmesh.cli.child", json.dumps(spec)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=json.loads)
    parser.add_argument("--worker-name", default="")
    parser.add_argument("--ready-fd", type=int)
    given = parser.parse_args()
    try:
        sys.exit(main(given.spec, name=given.worker_name, ready_fd=given.ready_fd))
    except MeshError as error:
        say_error(error)
        sys.exit(exit_code(error))
