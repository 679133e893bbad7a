"""The worker process of one model on one device, and the status of its engine that it reports.

The status goes to a file for the supervisor every second, and to the log every ten.
"""

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
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.config import Config
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import EMBED_QUEUE, DeviceQueue, Suspects
from agentmesh.inference.request import Gauge
from agentmesh.mesh import make_runtime
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.engine_status import STATUS_FOLDER_ENV, EngineStatus, write_status
from agentmesh.observability.logs import LogObserver, set_up_logging
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.optional import metrics_observers, set_up_tracing
from agentmesh.worker.asyncio_worker import run_as_program, stop_event, tune_garbage_collector
from agentmesh.worker.embed_queues import prepare_encoder
from agentmesh.worker.process import announce_ready, exit_with_parent

log = logging.getLogger("agentmesh.gpu")

STATUS_INTERVAL_S = 1.0
LOG_INTERVAL_S = 10.0  # also the window of the means


class StatusReporter:
    """Reports from a thread of its own; only to the log where STATUS_FOLDER_ENV names no folder.

    Args:
        engine: an inference.engine.InferenceEngine.
        worker: the process's name under its supervisor.
        in_flight: returns how many steps this process has; `places` is how many it may have.
    """

    def __init__(self, engine: Any, *, model: str, worker: str, in_flight: Callable[[], int], places: int) -> None:
        self._engine, self._model, self._worker = engine, model, worker
        self._in_flight, self._places = in_flight, places
        self._folder, self._written = os.environ.get(STATUS_FOLDER_ENV, ""), True
        self._samples: deque[tuple[float, Gauge]] = deque([(time.monotonic(), engine.gauge)])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentmesh-report", daemon=True)

    def start(self) -> None:
        """Report once, then continue in the thread."""
        self._sample()
        self._thread.start()

    def stop(self) -> None:
        """Stop reporting."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        logged_s = time.monotonic()
        while not self._over.wait(STATUS_INTERVAL_S):
            status = self._sample()
            if status.at_s - logged_s >= LOG_INTERVAL_S:
                logged_s = status.at_s
                if self._samples[-1][1].steps > self._samples[0][1].steps:
                    log.info(
                        "%s: %.1f requests a step, %.0f new tokens/s, %.0f %% of prompts cached, %d of %d pages free",
                        status.model, status.batch_requests, status.new_tokens_per_s, 100 * status.cached_share,
                        status.free_pages, status.pages,
                    )  # fmt: skip

    def _sample(self) -> EngineStatus:
        self._samples.append((time.monotonic(), self._engine.gauge))
        while len(self._samples) > 2 and self._samples[1][0] <= self._samples[-1][0] - LOG_INTERVAL_S:
            self._samples.popleft()
        status = self._status(self._samples[0], self._samples[-1])
        if self._folder:
            try:
                write_status(self._folder, status)
                self._written = True
            except OSError as e:  # the supervisor sees the age of the file
                if self._written:
                    log.warning("cannot write the status of %s for the supervisor: %s", self._model, e)
                self._written = False
        return status

    def _status(self, earlier: tuple[float, Gauge], later: tuple[float, Gauge]) -> EngineStatus:
        (then_s, then), (now_s, now) = earlier, later
        on_cpu, memory = self._engine.on_cpu, self._engine.memory
        return EngineStatus(
            worker=self._worker, pid=os.getpid(), model=self._model, at_s=now_s,
            device="cpu" if on_cpu else f"cuda:{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}",
            in_flight=self._in_flight(), places=self._places,
            running=0 if now.idle else now.running, waiting=now.waiting,
            batch_requests=(now.new_tokens - then.new_tokens) / max(1, now.steps - then.steps),
            new_tokens_per_s=(now.new_tokens - then.new_tokens) / max(STATUS_INTERVAL_S, now_s - then_s),
            cached_share=(now.cached_tokens - then.cached_tokens) / max(1, now.prompt_tokens - then.prompt_tokens),
            free_pages=now.free_pages, pages=now.pages,
            used_bytes=memory.used, free_bytes=memory.free, all_bytes=memory.all,
            stuck_s=self._engine.hung_s, deaths=now.deaths, batch_tokens=now.batch_tokens,
            steps=now.steps, prompt_tokens=now.prompt_tokens, cached_tokens=now.cached_tokens, new_tokens=now.new_tokens,
        )  # fmt: skip


# ---- The worker process of one model on one device ----------------------------------------------

RESTART_EXIT_CODE = 70  # sysexits' "internal software error"; the supervisor starts another
HUNG_AFTER_S = 60.0  # with work and no progress: renewed leases would hold its steps for ever
HUNG_POLL_S = 1.0
CANCEL_WITHIN_S = 1.0  # how long the answer of a cancelled run may still be computed


def main(spec: dict[str, Any], *, name: str = "", ready_fd: int | None = None) -> int:
    """Work until stopped: SIGTERM drains."""
    set_up_logging(spec.get("log", ""), worker=name)
    config = Config(**spec["config"])
    exit_with_parent(config.drain_s)
    over, models = stop_event(), ModelRegistry()
    crews = [load_crew(path) for path in spec["crews"]]
    set_up_tracing()
    served = {c.name: _served(c, spec) for c in crews}
    queues = [queue for crew in crews for queue in served[crew.name]]
    concurrency = spec["concurrency"] or max(q.concurrency for q in queues)
    ingest_crews = prepare_encoder(queues, _exit_for_restart)  # before the engine, which takes the memory that is left
    engine = _prepare_engine(models, spec["model"], queues, concurrency)
    observers, app = [LogObserver(), *metrics_observers()], make_app(config.broker)
    app.conf.worker_send_task_events = bool(spec.get("events"))
    runtimes = [
        make_runtime(
            c, app=app, config=config, models=models, worker=name, observers=observers, suspects=spec["suspects"]
        )
        for c in (*crews, *ingest_crews)
    ]
    crew_runtimes = runtimes[: len(crews)]
    workers = [_worker(app, crews, served, spec["suspects"], engine, concurrency)]
    for crew in ingest_crews:
        workers += make_workers(app, crew, [EMBED_QUEUE], suspects=spec["suspects"])
    worker = InProcessWorker(runtimes, workers).start()
    for runtime in crew_runtimes:
        if runtime.process_state.housekeeper is not None:
            runtime.process_state.housekeeper.renew_most_s = CANCEL_WITHIN_S
    if spec.get("beat") and any(crew.schedules for crew in crews):
        start_beat(app)
    tune_garbage_collector()
    report = StatusReporter(
        engine, model=spec["model"], worker=name, in_flight=lambda: _in_flight(crew_runtimes), places=concurrency
    )
    report.start()
    if ready_fd is not None:
        announce_ready(ready_fd)
    _exit_when_hung(engine, spec["model"], over)
    worker.stop(grace_s=config.drain_s)
    report.stop()
    run_sync(models.close())
    return 0


def _served(crew: Crew, spec: dict[str, Any]) -> list[DeviceQueue]:
    """The crew's queues whose model this process loads."""
    return [queue for queue in crew.queues.on_devices(spec["queues"]) if queue.model == spec["model"]]


def _worker(
    app: Any, crews: list[Crew], served: dict[str, list[DeviceQueue]], suspects: Suspects, engine: Any, concurrency: int
) -> EmbeddedWorker:
    """One for all crews: room and turns are counted for the engine, not for a crew."""
    queues: list[str] = []
    for crew in crews:
        if names := [queue.name for queue in served[crew.name]]:
            queues += crew.queues.broker_names(names, suspects=suspects)
    lanes = {crew.queues.broker_name(q.name): q.lane for crew in crews for q in served[crew.name]}
    return EmbeddedWorker(app, queues=queues, concurrency=concurrency, admits=Lanes(lanes, engine.admits))


def _prepare_engine(models: ModelRegistry, model: str, queues: list[DeviceQueue], requests: int) -> Any:
    """The engine, loaded and warm; where two queues of a model differ, the smaller number counts."""
    gc.disable()  # until tune_garbage_collector: collecting takes a seventh of the time that torch's import takes
    local: Any = models(f"local:{model}")[0]
    batch_tokens = [q.max_batch_tokens for q in queues if q.max_batch_tokens]
    started_s = time.monotonic()
    engine = local.prepare(
        memory=min(q.gpu_memory_fraction for q in queues),
        batch_tokens=min(batch_tokens, default=0),
        requests=requests,
        on_fatal=_exit_for_restart,
    )
    room, took_s = engine.room, time.monotonic() - started_s
    log.info("%s is loaded in %.1f s; its cache holds %d tokens", model, took_s, room.cache_tokens)
    return engine


def _exit_for_restart(error: Exception) -> None:
    log.error("this worker restarts: %s: %s", type(error).__name__, error)
    logging.shutdown()
    os._exit(RESTART_EXIT_CODE)  # a call on the device cannot be waited for


def _in_flight(runtimes: list[MeshRuntime]) -> int:
    return sum(len(runtime.engine.leases) for runtime in runtimes)


def _exit_when_hung(engine: Any, model: str, over: threading.Event) -> None:
    """Return when `over` is set; exit the process when the engine hangs."""
    while not over.wait(HUNG_POLL_S):
        if (hung_s := engine.hung_s) > HUNG_AFTER_S:
            _exit_for_restart(TimeoutError(f"the engine of {model!r} has made no progress for {hung_s:.0f} s"))


if __name__ == "__main__":
    sys.exit(run_as_program(main))
