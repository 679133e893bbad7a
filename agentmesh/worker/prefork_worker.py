"""The worker process for prefork queues: `python -m agentmesh.worker.prefork_worker --worker-name N --ready-fd FD`.

What it shall do is said as to `child.py`. One Celery worker serves the prefork queues of all its crews.
"""

import os
import signal
import socket
import sys
import threading
from typing import Any

from celery.signals import worker_ready
from celery.worker import state

from agentmesh.celery.app import make_app
from agentmesh.celery.beat import start_beat
from agentmesh.celery.prefork import make_worker
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.logs import LogObserver, set_up_logging
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.optional import metrics_observers, set_up_tracing
from agentmesh.worker.asyncio_worker import has_waiting_steps, run_as_program, wait_until_idle
from agentmesh.worker.process import announce_ready, exit_with_parent


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until told to stop: SIGTERM drains."""
    set_up_logging(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    exit_with_parent(config.drain_s)
    crews = [load_crew(path) for path in spec["crews"]]
    set_up_tracing()
    sights, models, app = [LogObserver(), *metrics_observers()], ModelRegistry(), make_app(config.broker)
    app.conf.worker_send_task_events = bool(spec.get("events"))
    served: list[str] = []
    processes, suspects = 0, spec.get("suspects", "include")
    for crew in crews:
        names = crew.queues.of_pool("prefork", spec["queues"])
        mesh = Mesh(crew, app=app, config=config, models=models, worker=name, observers=sights, suspects=suspects)
        if names:
            mesh.check()
            served += crew.queues.broker_names(names, suspects=suspects)
            processes += sum(crew.queues[queue].concurrency for queue in names)
    if spec.get("beat") and any(crew.schedules for crew in crews):
        start_beat(app)

    def ready(**_: Any) -> None:
        if ready_fd is not None:
            announce_ready(ready_fd)
        if suspects == "only":
            threading.Thread(
                target=_exit_when_idle, args=(mesh, served), name="agentmesh-unwanted", daemon=True
            ).start()

    worker_ready.connect(ready)
    node = f"prefork-{os.getpid()}@{socket.gethostname()}"
    worker = make_worker(app, queues=served, concurrency=spec["concurrency"] or processes, name=node)
    worker.start()
    return int(worker.exitcode or 0)


def _exit_when_idle(mesh: Mesh, queues: list[str]) -> None:
    wait_until_idle(threading.Event(), lambda: state.reserved_requests or has_waiting_steps(mesh, queues))
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(run_as_program(main))
