"""What a device's worker tells of its engine: each second in a file for its supervisor, each ten in the log."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from agentmesh.gpu.request import Gauge
from agentmesh.report import REPORTS_IN, EngineReport, put_report

log = logging.getLogger("agentmesh.gpu")

TELL_S = 1.0
LOG_S = 10.0  # also how far back the means look


class Reporting:
    """Tells from a thread of its own; where REPORTS_IN names no folder, only the log.

    Args:
        engine: a gpu.engine.Engine.
        worker: the process's name under its supervisor.
        in_hand: how many steps this process has; `places` is how many it may have.
    """

    def __init__(self, engine: Any, *, model: str, worker: str, in_hand: Callable[[], int], places: int) -> None:
        self._engine, self._model, self._worker = engine, model, worker
        self._in_hand, self._places = in_hand, places
        self._folder, self._written = os.environ.get(REPORTS_IN, ""), True
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
        while not self._over.wait(TELL_S):
            report = self._look()
            if report.at_s - logged_s >= LOG_S:
                logged_s = report.at_s
                if self._looks[-1][1].steps > self._looks[0][1].steps:
                    log.info(
                        "%s: %.1f requests a step, %.0f new tokens/s, %.0f %% of prompts cached, %d of %d pages free",
                        report.model, report.batch_requests, report.new_tokens_per_s, 100 * report.cached_share,
                        report.free_pages, report.pages,
                    )  # fmt: skip

    def _look(self) -> EngineReport:
        self._looks.append((time.monotonic(), self._engine.gauge))
        while len(self._looks) > 2 and self._looks[1][0] <= self._looks[-1][0] - LOG_S:
            self._looks.popleft()
        report = self._report(self._looks[0], self._looks[-1])
        if self._folder:
            try:
                put_report(self._folder, report)
                self._written = True
            except OSError as e:  # the supervisor sees that the file grows old
                if self._written:
                    log.warning("how %s does cannot be told to its supervisor: %s", self._model, e)
                self._written = False
        return report

    def _report(self, earlier: tuple[float, Gauge], later: tuple[float, Gauge]) -> EngineReport:
        (then_s, then), (now_s, now) = earlier, later
        on_cpu, memory = self._engine.on_cpu, self._engine.memory
        return EngineReport(
            worker=self._worker, pid=os.getpid(), model=self._model, at_s=now_s,
            device="cpu" if on_cpu else f"cuda:{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}",
            in_hand=self._in_hand(), places=self._places,
            running=0 if now.idle else now.running, waiting=now.waiting,
            batch_requests=(now.new_tokens - then.new_tokens) / max(1, now.steps - then.steps),
            new_tokens_per_s=(now.new_tokens - then.new_tokens) / max(TELL_S, now_s - then_s),
            cached_share=(now.cached_tokens - then.cached_tokens) / max(1, now.prompt_tokens - then.prompt_tokens),
            free_pages=now.free_pages, pages=now.pages,
            used_bytes=memory.used, free_bytes=memory.free, all_bytes=memory.all,
            stuck_s=self._engine.hung_s, deaths=now.deaths, batch_tokens=now.batch_tokens,
            steps=now.steps, prompt_tokens=now.prompt_tokens, cached_tokens=now.cached_tokens, new_tokens=now.new_tokens,
        )  # fmt: skip
