"""The worker process for prefork queues: `python -m agentmesh.cli.pooled --worker-name N --ready-fd FD`.

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

from agentmesh.boot import counting, export_traces, load_crew
from agentmesh.celery.app import make_app
from agentmesh.celery.beat import start_beat
from agentmesh.celery.offspring import announce_ready, leave_with_parent
from agentmesh.celery.prefork import make_worker
from agentmesh.cli.child import as_program, until_unwanted, waiting
from agentmesh.config import Config
from agentmesh.logs import Logged, set_up
from agentmesh.mesh import Mesh
from agentmesh.models.named import Models


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until told to stop: SIGTERM drains."""
    set_up(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    leave_with_parent(config.drain_s)
    crews = [load_crew(path) for path in spec["crews"]]
    export_traces()
    sights, models, app = [Logged(), *counting()], Models(), make_app(config.broker)
    app.conf.worker_send_task_events = bool(spec.get("events"))
    served: list[str] = []
    processes, suspects = 0, spec.get("suspects", "too")
    for crew in crews:
        names = crew.queues_in("prefork", spec["queues"])
        mesh = Mesh(crew, app=app, config=config, models=models, worker=name, sights=sights, suspects=suspects)
        if names:
            mesh.check()
            served += crew.broker_queues(names, suspects=suspects)
            processes += sum(crew.queues[queue].concurrency for queue in names)
    if spec.get("beat") and any(crew.schedules for crew in crews):
        start_beat(app)

    def ready(**_: Any) -> None:
        if ready_fd is not None:
            announce_ready(ready_fd)
        if suspects == "only":
            threading.Thread(
                target=_leave_unwanted, args=(mesh, served), name="agentmesh-unwanted", daemon=True
            ).start()

    worker_ready.connect(ready)
    node = f"prefork-{os.getpid()}@{socket.gethostname()}"
    worker = make_worker(app, queues=served, concurrency=spec["concurrency"] or processes, name=node)
    worker.start()
    return int(worker.exitcode or 0)


def _leave_unwanted(mesh: Mesh, queues: list[str]) -> None:
    until_unwanted(threading.Event(), lambda: state.reserved_requests or waiting(mesh, queues))
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(as_program(main))
