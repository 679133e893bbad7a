"""The worker process of one model on one device: `python -m agentmesh.cli.device --worker-name N --ready-fd FD`.

What it shall do is said as to `child.py`. It loads the model before it consumes, takes no more steps than the engine has
room for, and leaves with code 70 when it had better be started again.
"""

import gc
import logging
import os
import sys
import threading
import time
from typing import Any

from agentmesh.boot import counting, export_traces, load_crew
from agentmesh.celery.app import make_app
from agentmesh.celery.beat import start_beat
from agentmesh.celery.embedded import EmbeddedWorker
from agentmesh.celery.inprocess import InProcess, embedded
from agentmesh.celery.lanes import Lanes
from agentmesh.celery.loop import drive
from agentmesh.celery.offspring import announce_ready, leave_with_parent
from agentmesh.cli.child import as_program, spare_collector, told_to_stop
from agentmesh.cli.embedding import prepared
from agentmesh.cli.reporting import Reporting
from agentmesh.config import Config
from agentmesh.logs import Logged, set_up
from agentmesh.mesh import Mesh
from agentmesh.models.named import Models
from agentmesh.queue import EMBED, Queue

log = logging.getLogger("agentmesh.gpu")

AGAIN = 70  # sysexits' "internal software error"; the supervisor starts another
HUNG_S = 60.0  # with work in hand and no step: renewing leases alone would keep its steps for ever
LOOK_S = 1.0
CANCELLED_S = 1.0  # how long a cancelled run's answer may go on to be computed


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until told to stop: SIGTERM drains."""
    set_up(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    leave_with_parent(config.drain_s)
    over, models = told_to_stop(), Models()
    crews = [load_crew(path) for path in spec["crews"]]
    export_traces()
    served = {
        c.name: [q for q in c.queues_in("device", spec["queues"]) if c.queues[q].model == spec["model"]] for c in crews
    }
    queues = [crew.queues[q] for crew in crews for q in served[crew.name]]
    concurrency = spec["concurrency"] or max(q.concurrency for q in queues)
    embeds = prepared(queues, _leave)  # before the engine, which takes what it leaves
    engine = _prepared(models, spec["model"], queues, concurrency)
    sights, app = [Logged(), *counting()], make_app(config.broker)
    app.conf.worker_send_task_events = bool(spec.get("events"))
    homes = [
        Mesh(c, app=app, config=config, models=models, worker=name, sights=sights, suspects=spec["suspects"])
        for c in (*crews, *embeds)
    ]
    meshes = homes[: len(crews)]
    names = [n for c in crews if served[c.name] for n in c.broker_queues(served[c.name], suspects=spec["suspects"])]
    lanes = {c.broker_queue(q): c.queues[q].lane for c in crews for q in served[c.name]}
    admits = Lanes(lanes, engine.admits)
    # one for all crews: what there is room for, and whose turn it is, is the engine's and not a crew's
    workers = [EmbeddedWorker(app, queues=names, concurrency=concurrency, admits=admits)]
    for crew in embeds:
        workers += embedded(app, crew, [EMBED], suspects=spec["suspects"])
    worker = InProcess(homes, workers).start()
    for mesh in meshes:
        if mesh.site.tender is not None:
            mesh.site.tender.renew_most_s = CANCELLED_S
    if spec.get("beat") and any(crew.schedules for crew in crews):
        start_beat(app)
    spare_collector()
    report = Reporting(engine, model=spec["model"], worker=name, in_hand=lambda: _in_hand(meshes), places=concurrency)
    report.start()
    if ready_fd is not None:
        announce_ready(ready_fd)
    _watch(engine, spec["model"], over)
    worker.stop(grace_s=config.drain_s)
    report.stop()
    drive(models.close())
    return 0


def _prepared(models: Models, model: str, queues: list[Queue], requests: int) -> Any:
    """The engine, loaded and warm; where two queues of a model differ, the smaller wish counts."""
    gc.disable()  # until spare_collector: it would look again and again through what stays, a seventh of torch's import
    local: Any = models(f"local:{model}")[0]
    wishes = [q.max_batch_tokens for q in queues if q.max_batch_tokens]
    began = time.monotonic()
    engine = local.prepare(
        memory=min(q.gpu_memory for q in queues),
        batch_tokens=min(wishes, default=0),
        requests=requests,
        hopeless=_leave,
    )
    room, took = engine.room, time.monotonic() - began
    log.info("%s is loaded in %.1f s; its cache holds %d tokens", model, took, room.cache_tokens)
    return engine


def _leave(error: Exception) -> None:
    log.error("this worker leaves and is started again: %s: %s", type(error).__name__, error)
    logging.shutdown()
    os._exit(AGAIN)  # whatever is in the device's hands cannot be waited for


def _in_hand(meshes: list[Mesh]) -> int:
    return sum(len(mesh.engine.leases) for mesh in meshes)


def _watch(engine: Any, model: str, over: threading.Event) -> None:
    """Until told to stop: leave when the engine hangs."""
    while not over.wait(LOOK_S):
        if (hung := engine.hung_s) > HUNG_S:
            _leave(TimeoutError(f"the engine of {model!r} has made no step for {hung:.0f} s"))


if __name__ == "__main__":
    sys.exit(as_program(main))
