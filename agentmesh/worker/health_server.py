"""`agentmesh worker --metrics`: /metrics for Prometheus and /health for probes, from the supervisor's process."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from agentmesh.errors import ConfigError
from agentmesh.observability.engine_status import EngineStatus

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Health:
    """The health of a supervisor and its workers, as probes read it.

    Args:
        workers: how many processes are expected.
        ready: how many of them consume.
        journal: whether its server responds.
        engines: the last reports of device workers.
        now_s: when, in the machine's monotonic time.
    """

    workers: int
    ready: int
    journal: bool
    engines: Sequence[EngineStatus] = ()
    now_s: float = field(default_factory=time.monotonic)

    @property
    def is_healthy(self) -> bool:
        """Whether steps can be executed here."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is wrong, one sentence for each problem."""
        problems = [] if self.journal else ["the journal's server does not respond"]
        if self.ready != self.workers:
            problems.append(f"{self.ready} of {self.workers} workers consume")
        return problems + [reason for engine in self.engines if (reason := engine.unhealthy_reason(self.now_s))]

    @property
    def counts(self) -> dict[str, Any]:
        """Counts alone, which anybody may see, as JSON."""
        workers: dict[str, Any] = {"workers": {"expected": self.workers, "ready": self.ready}, "journal": self.journal}
        if self.engines:
            healthy = sum(not engine.unhealthy_reason(self.now_s) for engine in self.engines)
            workers["engines"] = {"all": len(self.engines), "healthy": healthy}
        return workers

    @property
    def report(self) -> dict[str, Any]:
        """Everything, for an operator, as JSON."""
        report = {"ready": self.is_healthy, **self.counts}
        if self.problems:
            report["problems"] = self.problems
        if self.engines:
            report["engines"] = [_engine_json(e, self.now_s) for e in self.engines]
        return report


def _engine_json(engine: EngineStatus, now_s: float) -> dict[str, Any]:
    report = asdict(engine)
    return report | {"age_s": round(now_s - report.pop("at_s"), 1), "unhealthy_reason": engine.unhealthy_reason(now_s)}


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `PORT` or `HOST:PORT`; without a host it is loopback.

    Raises:
        ConfigError: the text is neither.
    """
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--metrics {text!r} is not an address", hint="use PORT or HOST:PORT, such as 9464")
    return host.strip("[]") or LOOPBACK, int(port)


class HealthServer:
    """Serves on a thread of its own until it is closed.

    Args:
        at: host and port; port 0 takes a free one.
        page: answers /metrics; see `metrics_app`.

    Raises:
        ConfigError: the address is in use, or is not this machine's.
    """

    def __init__(self, at: tuple[str, int], *, page: "WSGIApplication", health: Callable[[], Health]) -> None:
        def answer(request: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
            path = request["PATH_INFO"].rstrip("/")
            if path == "/metrics":
                return page(request, start_response)
            status, kind, body = _answer(path, health)
            start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
            return [body]

        try:
            self._server = (_Server6 if ":" in at[0] else _HealthHttpServer)(at, _QuietHandler)
        except OSError as e:
            raise ConfigError(
                f"--metrics cannot listen at {at[0]}:{at[1]} ({e.strerror or e})", hint="choose another port"
            ) from None
        self._server.set_app(answer)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="agentmesh-metrics", daemon=True).start()

    def close(self) -> None:
        """Release the port."""
        self._server.shutdown()
        self._server.server_close()


def _answer(path: str, health: Callable[[], Health]) -> tuple[str, str, bytes]:
    """Status, content type and body of a path."""
    if path == "/health/live":  # that this process answers is enough
        return "200 OK", "application/json", b'{"live": true}'
    if path in ("/health", "/health/ready"):
        now = health()
        status = "200 OK" if now.is_healthy else "503 Service Unavailable"
        return status, "application/json", json.dumps(now.report).encode()
    return "404 Not Found", "text/plain", b"there are /metrics, /health/live and /health/ready\n"


class _HealthHttpServer(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Server6(_HealthHttpServer):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a probe comes every few seconds."""
