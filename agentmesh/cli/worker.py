"""`agentmesh worker`: supervised worker processes for one or more crews; a dead worker's leases are released at once."""

import asyncio
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, cast

from kombu.utils.url import maybe_sanitize_url

from agentmesh.celery.event_loop import run_sync
from agentmesh.config import Config, load_config
from agentmesh.errors import ConfigError, MeshError, ServiceDown
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import JournalCounts
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.engine_status import STATUS_FOLDER_ENV, EngineStatus, read_statuses
from agentmesh.observability.logs import Form, set_up_logging
from agentmesh.runtime.bootstrap import open_journal, resolve_servers
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.optional import METRICS_FOLDER_ENV, metrics_page
from agentmesh.runtime.valkey import EmbeddedValkey
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.embed_queues import consumed_queues
from agentmesh.worker.health_server import Health, HealthServer, parse_address
from agentmesh.worker.standby import standby_workers
from agentmesh.worker.supervisor import Supervisor

RELEASE_RETRY_S = 0.2
STOPPED = -15  # killed by our own SIGTERM before its handler was there
REPLY_TIMEOUT_S = 2.0  # how long a health check or a scrape waits for the journal


def release_on_death(config: Config, queues: list[str]) -> Callable[[str, int], None]:
    """A function that releases what a dead worker held: its leases at once, messages it had not begun at the next sweep.

    While the journal does not respond it is retried, for as long as the leases may last.
    """

    def release(worker: str, code: int) -> None:
        until = time.monotonic() + config.lease_s
        while True:
            try:
                _release(worker, code)
                return
            except (ServiceDown, OSError):
                if time.monotonic() > until:
                    raise
                time.sleep(RELEASE_RETRY_S)

    def _release(worker: str, code: int) -> None:
        _, journal, valkey = open_journal(config)
        try:
            run_sync(journal.release(worker, crashed=code not in (0, STOPPED), queues=queues, below=True))
        finally:
            run_sync(journal.close())
            if valkey is not None:
                valkey.leave()

    return release


def run_workers(
    crews: list[str], *, queues: list[str], concurrency: int, processes: int, broker: str, model: str, file: Path | None,
    metrics: str = "", log: str = "", beat: bool = False, events: bool = False,
) -> int:  # fmt: skip
    """Supervise until stopped."""
    form = _log_form(log)
    set_up_logging(form or "text")
    config = load_config(file=file, broker=broker or None, model=model or None)
    loaded = {path: load_crew(path) for path in crews}  # here, so that an error in a file is reported once
    for model_name in {q.model for c in loaded.values() for q in c.queues.on_devices(queues)}:
        ModelRegistry().check(f"local:{model_name}")
    served = consumed_queues(loaded.values(), queues)
    config, valkey = resolve_servers(config)
    servers = where(config, valkey)
    commands = worker_commands(
        config, loaded, queues=queues, concurrency=concurrency, processes=processes, log=form, beat=beat, events=events,
        suspects="exclude",
    )  # fmt: skip
    standby = standby_workers(config, loaded, queues=queues, concurrency=concurrency, log=form, events=events)
    with ExitStack() as stack:
        if valkey is not None:
            stack.callback(valkey.leave)
        folder = stack.enter_context(status_folder()) if metrics else ""
        supervisor = Supervisor(
            commands, standby=standby, on_death=release_on_death(config, served), drain_s=config.drain_s + 2,
            env={METRICS_FOLDER_ENV: folder, STATUS_FOLDER_ENV: folder} if metrics else {},
        )  # fmt: skip
        endpoint = serve_metrics(stack, metrics, config, supervisor, folder) if metrics else ""
        size = f"{processes} × {concurrency or 'as declared'}"
        print(f"crews {', '.join(c.name for c in loaded.values())} · queues {', '.join(served)} · {size} "
              f"· {servers} · lease {config.lease_s:g} s · drain {config.drain_s:g} s{endpoint}", flush=True)  # fmt: skip
        return supervisor.run()


def where(config: Config, valkey: EmbeddedValkey | None) -> str:
    """Where broker and journal are, without passwords."""
    if valkey is not None and config.broker == valkey.broker_url:
        return "broker and journal the embedded Valkey"
    broker = f"broker {maybe_sanitize_url(config.broker)}"
    if valkey is not None:
        return f"{broker} · journal the embedded Valkey in {config.home}, for workers of this machine"
    return f"{broker} · journal {maybe_sanitize_url(config.journal)}" if config.journal else broker


def _log_form(log: str) -> Form | Literal[""]:
    if log not in ("", "text", "json"):
        raise ConfigError(f"unknown log format in --log {log!r}", hint="use one of: text, json")
    return cast("Form", log)


def status_folder() -> "tempfile.TemporaryDirectory[str]":
    """The folder that worker processes write their counts and status to, while their supervisor lives."""
    return tempfile.TemporaryDirectory(prefix="agentmesh-metrics-", ignore_cleanup_errors=True)


def serve_metrics(stack: ExitStack, metrics: str, config: Config, supervisor: Supervisor, folder: str) -> str:
    """Serve the endpoint until the stack is closed; returns what to print about it.

    Args:
        folder: what the workers write their counts and status to.
    """
    _, journal, valkey = open_journal(config)
    if valkey is not None:
        stack.callback(valkey.leave)
    stack.callback(lambda: run_sync(journal.close()))

    def counts() -> JournalCounts | None:
        return run_sync(_counts(journal))

    def engines() -> list[EngineStatus]:
        return read_statuses(folder, supervisor.names)

    def health() -> Health:
        return Health(*supervisor.health, journal=counts() is not None, engines=engines())

    host, port = parse_address(metrics)
    page = metrics_page(folder, counts, lambda: supervisor.health, engines)
    endpoint = HealthServer((host, port), page=page, health=health)
    stack.callback(endpoint.close)
    return f" · metrics http://{host}:{endpoint.port}/metrics"


async def _counts(journal: Journal) -> JournalCounts | None:
    try:
        return await asyncio.wait_for(journal.counts(), REPLY_TIMEOUT_S)
    except (TimeoutError, MeshError):
        return None
