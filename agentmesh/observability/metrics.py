"""Prometheus metrics: what workers did, counted in files that outlive them, and what the journal holds at a scrape.

Needs the extra `metrics`. A worker process counts only when PROMETHEUS_MULTIPROC_DIR names a folder before this is
imported: prometheus_client then keeps its numbers in memory-mapped files there, and a process that is killed loses none.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, make_wsgi_app, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agentmesh.definitions.step import Step
from agentmesh.engine.executor import Attempt
from agentmesh.engine.replay import History
from agentmesh.journal.events import Event, StepDone, StepFailed, StepRetried
from agentmesh.journal.types import JournalCounts
from agentmesh.observability.cache_metrics import CacheMetrics, remove_gauges_of_dead
from agentmesh.observability.engine_status import EngineStatus
from agentmesh.observability.observer import OnStepEnd

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
OUTCOMES = {"StepDone": "done", "StepFailed": "failed", "StepRetried": "retried", "StepInDoubt": "in_doubt"}

# An engine's metrics: name to help text, own label, and the field of a report for each value of that label.
ENGINE_GAUGES = {
    "places": ("Steps a device worker may have", "state", {"taken": "in_flight", "all": "places"}),
    "requests": ("Requests in the engine's last batch and before it", "state", {"running": "running", "waiting": "waiting"}),
    "batch_requests": ("Requests in a step of the engine, mean of the last 10 s", "", {"": "batch_requests"}),
    "new_tokens_per_second": ("New tokens a second, of the last 10 s", "", {"": "new_tokens_per_s"}),
    "cached_share": ("The part of prompts' tokens found in the cache, of the last 10 s", "", {"": "cached_share"}),
    "pages": ("Pages of the engine's cache", "state", {"free": "free_pages", "all": "pages"}),
    "memory_bytes": (
        "Memory of the process, and of its GPU", "state",
        {"used": "used_bytes", "gpu_free": "free_bytes", "gpu_all": "all_bytes"},
    ),
    "stuck_seconds": ("For how long there has been work in flight and no step", "", {"": "stuck_s"}),
    "batch_tokens": ("New tokens of one step at most", "", {"": "batch_tokens"}),
}  # fmt: skip
ENGINE_COUNTS = {
    "steps": ("Steps of the engine's loop", "", {"": "steps"}),
    "tokens": ("Tokens", "type", {"prompt": "prompt_tokens", "cached": "cached_tokens", "new": "new_tokens"}),
    "deaths": ("How often the engine's loop ended by an error", "", {"": "deaths"}),
}


class MetricsObserver:
    """An observer that counts. Names of agents and tools are labels, run ids never."""

    def __init__(self) -> None:
        step = ("kind", "name")
        own = CollectorRegistry()  # not the default one: a crew's own metrics are its own
        self._steps = Counter("agentmesh_steps", "Attempts at steps, by outcome", (*step, "outcome"), registry=own)
        self._repeats = Counter("agentmesh_repeats", "Attempts that were not the first", step, registry=own)
        self._seconds = Histogram(
            "agentmesh_step_seconds", "Seconds of an attempt", step, buckets=SECONDS, registry=own
        )
        self._tokens = Counter("agentmesh_tokens", "Tokens of model calls", ("agent", "model", "type"), registry=own)
        self._cost = Counter("agentmesh_cost_usd", "Dollars of model calls", ("agent", "model"), registry=own)
        self._runs = Counter("agentmesh_runs_ended", "Runs that workers ended", ("agent", "status"), registry=own)
        self._caches = CacheMetrics(own)

    def step(self, step: Step[Any], at: Attempt, model: str) -> Any:
        """See Observer."""
        return self._attempt(step, at, model)

    @contextmanager
    def _attempt(self, step: Step[Any], at: Attempt, model: str) -> Iterator[OnStepEnd]:
        outcome, began_s = "cut", time.monotonic()

        def on_end(event: Event) -> None:
            nonlocal outcome
            outcome = OUTCOMES.get(type(event).__name__, "cut")
            if isinstance(event, StepDone | StepFailed | StepRetried) and event.usage:
                usage = event.usage
                self._tokens.labels(step.name, model, "input").inc(usage.get("in", 0))
                self._tokens.labels(step.name, model, "output").inc(usage.get("out", 0))
                self._cost.labels(step.name, model).inc(usage.get("usd", 0))

        try:
            yield on_end
        finally:
            self._steps.labels(step.kind, step.name, outcome).inc()
            self._seconds.labels(step.kind, step.name).observe(time.monotonic() - began_s)
            if at.number > 1:
                self._repeats.labels(step.kind, step.name).inc()
            self._caches.refresh()

    def ended(self, history: History, end: Event) -> None:
        """See Observer."""
        if history.started is not None:
            status = type(end).__name__.removeprefix("Run").lower()
            self._runs.labels(history.started.agent, status).inc()


class _JournalCollector(Collector):
    """The journal's numbers, read at each scrape; none of them when it does not respond."""

    def __init__(self, counts: Callable[[], JournalCounts | None], workers: Callable[[], tuple[int, int]]) -> None:
        self._counts, self._workers = counts, workers

    def collect(self) -> Iterable[GaugeMetricFamily]:
        expected, ready = self._workers()
        yield _gauge("agentmesh_workers", "Worker processes of this supervisor", wanted=expected, ready=ready)
        now = self._counts()
        up = GaugeMetricFamily("agentmesh_journal_up", "Whether the journal's server answers")
        up.add_metric((), int(now is not None))
        yield up
        if now is None:
            return
        depth = GaugeMetricFamily("agentmesh_queue_depth", "Entries that wait for a worker", labels=("queue",))
        for queue, waiting in sorted(now.queues.items()):
            depth.add_metric((queue,), waiting)
        yield depth
        entries = GaugeMetricFamily("agentmesh_entries", "Entries that wait for something else", labels=("state",))
        for state, number in (("leased", now.leased), ("due", now.due), ("held", now.held)):
            entries.add_metric((state,), number)
        yield entries
        yield _gauge(
            "agentmesh_overdue", "Entries that a sweep should have moved", leased=now.expired, due=now.late,
            queued=now.lost,
        )  # fmt: skip
        runs = GaugeMetricFamily("agentmesh_open_runs", "Runs that have not ended, sub-agents' too")
        runs.add_metric((), now.open_runs)
        yield runs


def _gauge(name: str, text: str, **values: int) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=("state",))
    for state, value in values.items():
        family.add_metric((state,), value)
    return family


class _EngineCollector(Collector):
    """The last reports of device workers' engines; those of workers that ended have no rows."""

    def __init__(self, engines: Callable[[], Sequence[EngineStatus]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        now = self._engines()
        for family, names in ((GaugeMetricFamily, ENGINE_GAUGES), (CounterMetricFamily, ENGINE_COUNTS)):
            for name, (text, label, numbers) in names.items():
                labels = ("model", "device", label) if label else ("model", "device")
                rows = family(f"agentmesh_engine_{name}", text, labels=labels)
                for engine in now:
                    for value, attribute in numbers.items():
                        if engine.all_bytes or not value.startswith("gpu_"):
                            where = (engine.model, engine.device)
                            rows.add_metric((*where, value) if label else where, getattr(engine, attribute))
                yield rows


def metrics_app(
    folder: str, counts: Callable[[], JournalCounts | None], workers: Callable[[], tuple[int, int]],
    engines: Callable[[], Sequence[EngineStatus]] = tuple,
) -> "WSGIApplication":  # fmt: skip
    """prometheus_client's own application: text or OpenMetrics as the scraper accepts, gzipped, filtered by `name[]`.

    Args:
        folder: PROMETHEUS_MULTIPROC_DIR of the workers.
        workers: how many are expected, and how many are ready.
        engines: the last reports of device workers.
    """
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]
    registry.register(_JournalCollector(counts, workers))
    registry.register(_EngineCollector(engines))
    page = make_wsgi_app(registry)

    def app(environ: Any, start_response: Any) -> Any:
        remove_gauges_of_dead(folder)
        return page(environ, start_response)

    return app
