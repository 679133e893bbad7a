"""What a device's worker tells of its engine: each second in a file for its supervisor, each ten in the log."""

import gc
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from agentmesh.celery.app import make_app
from agentmesh.celery.beat import start_beat
from agentmesh.celery.embedded import EmbeddedWorker, InProcessWorker, make_workers
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.lanes import Lanes
from agentmesh.config import Config
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import EMBED_QUEUE, Queue
from agentmesh.inference.request import Gauge
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.engine_status import STATUS_FOLDER_ENV, EngineStatus, write_status
from agentmesh.observability.logs import LogObserver, set_up_logging
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.optional import metrics_observers, set_up_tracing
from agentmesh.worker.asyncio_worker import run_as_program, stop_event, tune_garbage_collector
from agentmesh.worker.embed_queues import prepare_encoder
from agentmesh.worker.process import announce_ready, exit_with_parent

log = logging.getLogger("agentmesh.gpu")

STATUS_S = 1.0
LOG_S = 10.0  # also how far back the means look


class StatusReporter:
    """Tells from a thread of its own; where STATUS_FOLDER_ENV names no folder, only the log.

    Args:
        engine: a inference.engine.Engine.
        worker: the process's name under its supervisor.
        in_hand: how many steps this process has; `places` is how many it may have.
    """

    def __init__(self, engine: Any, *, model: str, worker: str, in_hand: Callable[[], int], places: int) -> None:
        self._engine, self._model, self._worker = engine, model, worker
        self._in_hand, self._places = in_hand, places
        self._folder, self._written = os.environ.get(STATUS_FOLDER_ENV, ""), True
        self._looks: deque[tuple[float, Gauge]] = deque([(time.monotonic(), engine.gauge)])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="agentmesh-report", daemon=True)

    def start(self) -> None:
        """Come back when it has told once."""
        self._look()
        self._thread.start()

    def stop(self) -> None:
        """Tell no more."""
        self._over.set()
        self._thread.join()

    def _tell(self) -> None:
        logged_s = time.monotonic()
        while not self._over.wait(STATUS_S):
            report = self._look()
            if report.at_s - logged_s >= LOG_S:
                logged_s = report.at_s
                if self._looks[-1][1].steps > self._looks[0][1].steps:
                    log.info(
                        "%s: %.1f requests a step, %.0f new tokens/s, %.0f %% of prompts cached, %d of %d pages free",
                        report.model, report.batch_requests, report.new_tokens_per_s, 100 * report.cached_share,
                        report.free_pages, report.pages,
                    )  # fmt: skip

    def _look(self) -> EngineStatus:
        self._looks.append((time.monotonic(), self._engine.gauge))
        while len(self._looks) > 2 and self._looks[1][0] <= self._looks[-1][0] - LOG_S:
            self._looks.popleft()
        report = self._report(self._looks[0], self._looks[-1])
        if self._folder:
            try:
                write_status(self._folder, report)
                self._written = True
            except OSError as e:  # the supervisor sees that the file grows old
                if self._written:
                    log.warning("cannot report the status of %s to the supervisor: %s", self._model, e)
                self._written = False
        return report

    def _report(self, earlier: tuple[float, Gauge], later: tuple[float, Gauge]) -> EngineStatus:
        (then_s, then), (now_s, now) = earlier, later
        on_cpu, memory = self._engine.on_cpu, self._engine.memory
        return EngineStatus(
            worker=self._worker, pid=os.getpid(), model=self._model, at_s=now_s,
            device="cpu" if on_cpu else f"cuda:{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}",
            in_hand=self._in_hand(), places=self._places,
            running=0 if now.idle else now.running, waiting=now.waiting,
            batch_requests=(now.new_tokens - then.new_tokens) / max(1, now.steps - then.steps),
            new_tokens_per_s=(now.new_tokens - then.new_tokens) / max(STATUS_S, now_s - then_s),
            cached_share=(now.cached_tokens - then.cached_tokens) / max(1, now.prompt_tokens - then.prompt_tokens),
            free_pages=now.free_pages, pages=now.pages,
            used_bytes=memory.used, free_bytes=memory.free, all_bytes=memory.all,
            stuck_s=self._engine.hung_s, deaths=now.deaths, batch_tokens=now.batch_tokens,
            steps=now.steps, prompt_tokens=now.prompt_tokens, cached_tokens=now.cached_tokens, new_tokens=now.new_tokens,
        )  # fmt: skip


# ---- The worker process of one model on one device ----------------------------------------------

RESTART_EXIT_CODE = 70  # sysexits' "internal software error"; the supervisor starts another
HUNG_AFTER_S = 60.0  # with work in hand and no step: renewing leases alone would keep its steps for ever
POLL_S = 1.0
CANCELLED_S = 1.0  # how long a cancelled run's answer may go on to be computed


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until told to stop: SIGTERM drains."""
    set_up_logging(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    exit_with_parent(config.drain_s)
    over, models = stop_event(), ModelRegistry()
    crews = [load_crew(path) for path in spec["crews"]]
    set_up_tracing()
    served = {c.name: _served(c, spec) for c in crews}
    queues = [crew.queues[q] for crew in crews for q in served[crew.name]]
    concurrency = spec["concurrency"] or max(q.concurrency for q in queues)
    embeds = prepare_encoder(queues, _exit_for_restart)  # before the engine, which takes what it leaves
    engine = _prepare_engine(models, spec["model"], queues, concurrency)
    sights, app = [LogObserver(), *metrics_observers()], make_app(config.broker)
    app.conf.worker_send_task_events = bool(spec.get("events"))
    homes = [
        Mesh(c, app=app, config=config, models=models, worker=name, observers=sights, suspects=spec["suspects"])
        for c in (*crews, *embeds)
    ]
    meshes = homes[: len(crews)]
    names = [n for c in crews if (own := served[c.name]) for n in c.queues.broker_names(own, suspects=spec["suspects"])]
    lanes = {c.queues.broker_name(q): c.queues[q].lane for c in crews for q in served[c.name]}
    admits = Lanes(lanes, engine.admits)
    # one for all crews: what there is room for, and whose turn it is, is the engine's and not a crew's
    workers = [EmbeddedWorker(app, queues=names, concurrency=concurrency, admits=admits)]
    for crew in embeds:
        workers += make_workers(app, crew, [EMBED_QUEUE], suspects=spec["suspects"])
    worker = InProcessWorker(homes, workers).start()
    for mesh in meshes:
        if mesh.process_state.housekeeper is not None:
            mesh.process_state.housekeeper.renew_most_s = CANCELLED_S
    if spec.get("beat") and any(crew.schedules for crew in crews):
        start_beat(app)
    tune_garbage_collector()
    report = StatusReporter(
        engine, model=spec["model"], worker=name, in_hand=lambda: _in_flight(meshes), places=concurrency
    )
    report.start()
    if ready_fd is not None:
        announce_ready(ready_fd)
    _exit_when_hung(engine, spec["model"], over)
    worker.stop(grace_s=config.drain_s)
    report.stop()
    run_sync(models.close())
    return 0


def _served(crew: Crew, spec: dict[str, Any]) -> list[str]:
    """The crew's queues whose model this process has loaded."""
    return [q for q in crew.queues.of_pool("device", spec["queues"]) if crew.queues[q].model == spec["model"]]


def _prepare_engine(models: ModelRegistry, model: str, queues: list[Queue], requests: int) -> Any:
    """The engine, loaded and warm; where two queues of a model differ, the smaller wish counts."""
    gc.disable()  # until spare_collector: it would look again and again through what stays, a seventh of torch's import
    local: Any = models(f"local:{model}")[0]
    wishes = [q.max_batch_tokens for q in queues if q.max_batch_tokens]
    began = time.monotonic()
    engine = local.prepare(
        memory=min(q.gpu_memory for q in queues),
        batch_tokens=min(wishes, default=0),
        requests=requests,
        on_fatal=_exit_for_restart,
    )
    room, took = engine.room, time.monotonic() - began
    log.info("%s is loaded in %.1f s; its cache holds %d tokens", model, took, room.cache_tokens)
    return engine


def _exit_for_restart(error: Exception) -> None:
    log.error("this worker restarts: %s: %s", type(error).__name__, error)
    logging.shutdown()
    os._exit(RESTART_EXIT_CODE)  # whatever is in the device's hands cannot be waited for


def _in_flight(meshes: list[Mesh]) -> int:
    return sum(len(mesh.engine.leases) for mesh in meshes)


def _exit_when_hung(engine: Any, model: str, over: threading.Event) -> None:
    """Until told to stop: leave when the engine hangs."""
    while not over.wait(POLL_S):
        if (hung := engine.hung_s) > HUNG_AFTER_S:
            _exit_for_restart(TimeoutError(f"the engine of {model!r} has made no progress for {hung:.0f} s"))


if __name__ == "__main__":
    sys.exit(run_as_program(main))
