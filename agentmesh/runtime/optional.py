"""What optional extras add: metrics, traces and the HTTP server. Each is imported at its first use."""

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from agentmesh.errors import ConfigError, ExtraMissing

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from agentmesh.journal.types import JournalCounts
    from agentmesh.observability.engine_status import EngineStatus
    from agentmesh.observability.observer import Observer
    from agentmesh.serve.server import HttpServer


# ---- metrics and traces ------------------------------------------------------------------------
METRICS_FOLDER_ENV = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name for the folder of its counters


def metrics_observers() -> "list[Observer]":
    """The observer that counts for Prometheus, where this process was started with a folder for it."""
    if not os.environ.get(METRICS_FOLDER_ENV):
        return []
    from agentmesh.observability.metrics import MetricsObserver

    return [MetricsObserver()]


def metrics_page(
    folder: str, counts: "Callable[[], JournalCounts | None]", workers: Callable[[], tuple[int, int]],
    engines: "Callable[[], Sequence[EngineStatus]]",
) -> "WSGIApplication":  # fmt: skip
    """The WSGI application that Prometheus scrapes: counters of workers, counts of the journal, status of engines.

    Raises:
        ExtraMissing: prometheus_client is not installed.
    """
    try:
        from agentmesh.observability.metrics import metrics_app
    except ImportError as e:
        raise ExtraMissing(
            f"--metrics needs {e.name}, which is not installed", hint="pip install 'agentmesh-celery[metrics]'"
        ) from None
    return metrics_app(folder, counts, workers, engines)


def http_server(host: str, port: int, key_env: str) -> "HttpServer":
    """A server for a mesh, bound to this address.

    Raises:
        ExtraMissing: starlette or uvicorn are not installed.
        ConfigError: the address cannot be bound, or needs a key.
    """
    try:
        from agentmesh.serve.server import HttpServer
    except ImportError as e:
        raise ExtraMissing(
            f"`agentmesh serve` needs {e.name}, which is not installed", hint="pip install 'agentmesh-celery[serve]'"
        ) from None
    return HttpServer(host, port, key_env)


def set_up_tracing() -> None:
    """Set up OpenTelemetry's SDK from its own variables, unless this process did so already or none is set.

    Raises:
        ExtraMissing: a variable names an exporter and the SDK is not installed.
        ConfigError: there is no exporter of that name.
    """
    exporter_names = os.environ.get(
        "OTEL_TRACES_EXPORTER", "otlp" if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") else "none"
    )
    if exporter_names == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise ExtraMissing(
            f"OTEL_TRACES_EXPORTER needs {e.name}, which is not installed", hint="pip install 'agentmesh-celery[otel]'"
        ) from None
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    provider = TracerProvider()  # it reads resource, sampler and limits from OTEL_*, and flushes at exit
    for name in exporter_names.split(","):
        exporters = importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=_exporter(name.strip()))
        if not exporters:
            raise ConfigError(
                f"OpenTelemetry exporter {name!r} is not installed",
                hint="for `otlp` install opentelemetry-exporter-otlp-proto-http",
            )
        provider.add_span_processor(BatchSpanProcessor(next(iter(exporters)).load()()))
    trace.set_tracer_provider(provider)


def _exporter(name: str) -> str:
    """`otlp` by its protocol; the SDK's console exporter has its own entry."""
    if name != "otlp":
        return name
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", ""))
    return "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
