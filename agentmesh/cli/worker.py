"""`agentmesh worker`: supervised worker processes for one or more crews; what a dead one held is given back at once."""

import asyncio
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, cast

from kombu.utils.url import maybe_sanitize_url

from agentmesh.celery.event_loop import run_sync
from agentmesh.config import Config, load
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

RETRY_S = 0.2
STOPPED = -15  # killed by our own SIGTERM before it could answer it
REPLY_TIMEOUT_S = 2.0  # how long a probe or a scrape waits for the journal


def release_on_death(config: Config, queues: list[str]) -> Callable[[str, int], None]:
    """Gives back what a dead worker held: its leases at once, and what it had taken from the broker at the next sweep.

    A store that is away as well is asked again for as long as the leases may run.
    """

    def give_back(worker: str, code: int) -> None:
        until = time.monotonic() + config.lease_s
        while True:
            try:
                _give_back(worker, code)
                return
            except (ServiceDown, OSError):
                if time.monotonic() > until:
                    raise
                time.sleep(RETRY_S)

    def _give_back(worker: str, code: int) -> None:
        _, journal, valkey = open_journal(config)
        try:
            run_sync(journal.release(worker, crashed=code not in (0, STOPPED), queues=queues, below=True))
        finally:
            run_sync(journal.close())
            if valkey is not None:
                valkey.leave()

    return give_back


def run_workers(
    crews: list[str], *, queues: list[str], concurrency: int, processes: int, broker: str, model: str, file: Path | None,
    metrics: str = "", log: str = "", beat: bool = False, events: bool = False,
) -> int:  # fmt: skip
    """Supervise until stopped."""
    form = _log_form(log)
    set_up_logging(form or "text")
    config = load(file=file, broker=broker or None, model=model or None)
    loaded = {path: load_crew(path) for path in crews}  # what is wrong with a file is said once, here
    for here in {c.queues[q].model for c in loaded.values() for q in c.queues.of_pool("device", queues)}:
        ModelRegistry().check(f"local:{here}")
    served = consumed_queues(loaded.values(), queues)
    config, valkey = resolve_servers(config)
    at_place = where(config, valkey)
    commands = worker_commands(
        config, loaded, queues=queues, concurrency=concurrency, processes=processes, log=form, beat=beat, events=events,
        suspects="exclude",
    )  # fmt: skip
    spares = standby_workers(config, loaded, queues=queues, concurrency=concurrency, log=form, events=events)
    with ExitStack() as stack:
        if valkey is not None:
            stack.callback(valkey.leave)
        counts_in = stack.enter_context(status_folder()) if metrics else ""
        supervisor = Supervisor(
            commands, spares=spares, on_death=release_on_death(config, served), drain_s=config.drain_s + 2,
            env={METRICS_FOLDER_ENV: counts_in, STATUS_FOLDER_ENV: counts_in} if metrics else {},
        )  # fmt: skip
        at = serve_metrics(stack, metrics, config, supervisor, counts_in) if metrics else ""
        hands = f"{processes} × {concurrency or 'as declared'}"
        print(f"crews {', '.join(c.name for c in loaded.values())} · queues {', '.join(served)} · {hands} "
              f"· {at_place} · lease {config.lease_s:g} s · drain {config.drain_s:g} s{at}", flush=True)  # fmt: skip
        return supervisor.run()


def where(config: Config, valkey: EmbeddedValkey | None) -> str:
    """Where messages and journal are, without passwords."""
    if valkey is not None and config.broker == valkey.broker_url:
        return "broker and journal the embedded Valkey"
    broker = f"broker {maybe_sanitize_url(config.broker)}"
    if valkey is not None:
        return f"{broker} · journal the embedded Valkey in {config.home}, for workers of this machine"
    return f"{broker} · journal {maybe_sanitize_url(config.journal)}" if config.journal else broker


def _log_form(log: str) -> Form | Literal[""]:
    if log not in ("", "text", "json"):
        raise ConfigError(f"--log {log!r} is not a log format", hint="use `text` or `json`")
    return cast("Form", log)


def status_folder() -> "tempfile.TemporaryDirectory[str]":
    """Where worker processes count and report, while their supervisor lives."""
    return tempfile.TemporaryDirectory(prefix="agentmesh-metrics-", ignore_cleanup_errors=True)


def serve_metrics(stack: ExitStack, metrics: str, config: Config, supervisor: Supervisor, counts_in: str) -> str:
    """The endpoint for as long as the stack lives; what to print about it.

    Args:
        counts_in: the folder that the workers count and report in.
    """
    _, journal, valkey = open_journal(config)
    if valkey is not None:
        stack.callback(valkey.leave)
    stack.callback(lambda: run_sync(journal.close()))

    def counts() -> JournalCounts | None:
        return run_sync(_counts(journal))

    def engines() -> list[EngineStatus]:
        return read_statuses(counts_in, supervisor.names)

    def health() -> Health:
        return Health(*supervisor.health, journal=counts() is not None, engines=engines())

    host, port = parse_address(metrics)
    page = metrics_page(counts_in, counts, lambda: supervisor.health, engines)
    endpoint = HealthServer((host, port), page=page, health=health)
    stack.callback(endpoint.close)
    return f" · metrics http://{host}:{endpoint.port}/metrics"


def journal_answers(journal: Journal) -> bool:
    """Whether the journal's server does."""
    return run_sync(_counts(journal)) is not None


async def _counts(journal: Journal) -> JournalCounts | None:
    try:
        return await asyncio.wait_for(journal.counts(), REPLY_TIMEOUT_S)
    except (TimeoutError, MeshError):
        return None
