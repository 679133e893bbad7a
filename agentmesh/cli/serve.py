"""`agentmesh serve`: an OpenAI-compatible endpoint over a crew, with supervised workers of its own."""

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from agentmesh.celery.event_loop import run_sync
from agentmesh.cli.run import origin_of
from agentmesh.cli.worker import REPLY_TIMEOUT_S, release_on_death, status_folder, where
from agentmesh.config import Config, load_config
from agentmesh.definitions.crew import Crew, models_of
from agentmesh.errors import MeshError
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.engine_status import STATUS_FOLDER_ENV, read_statuses
from agentmesh.runtime.bootstrap import check_models, resolve_servers
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.optional import http_server
from agentmesh.runtime.process_exit import DONE, INTERRUPTED
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.embed_queues import consumed_queues
from agentmesh.worker.health_server import Health
from agentmesh.worker.standby import standby_workers
from agentmesh.worker.supervisor import Supervisor

FORCED_STOP_S = 2.0  # how long workers may drain after Ctrl-C; after SIGTERM it is `drain_s`


def serve_crew(
    path: str, *, host: str, port: int, key_env: str, embed: Sequence[str], processes: int, broker: str, model: str,
    file: Path | None,
) -> int:  # fmt: skip
    """Serve until stopped; runs that are still open then can be resumed."""
    crew = load_crew(path)
    settings = load_config(file=file, broker=broker or None, model=model or None)
    check_models(crew, settings)
    server = http_server(host, port, key_env)  # first: a wrong address is reported before anything is started
    vectors = _embedders(embed)
    with ExitStack() as stack:
        config, valkey = resolve_servers(settings)
        if valkey is not None:
            stack.callback(valkey.leave)
        mesh = Mesh(crew, config=config, models=ModelRegistry())
        mesh.check()
        stack.callback(mesh.close)
        reports = stack.enter_context(status_folder()) if processes else ""
        supervisor = _workers(config, path, crew, processes, reports) if processes else None

        def health() -> tuple[bool, dict[str, Any]]:
            expected, ready = supervisor.health if supervisor is not None else (0, 0)
            engines = read_statuses(reports, supervisor.names) if supervisor is not None else ()
            now = Health(expected, ready, journal=_journal_answers(mesh), engines=engines)
            return now.is_healthy, now.counts

        models = models_of(crew, config.model)
        key = f"key from {key_env}" if server.key else "no key, only for this machine"
        line = (f"crew {crew.name} · {server.url}/v1 · models {', '.join([*crew.agents, *models, *vectors])} · {key} · "
                f"workers {supervisor.health[0] if supervisor is not None else 'elsewhere'} · {where(config, valkey)}")  # fmt: skip
        signal_number = 0
        try:
            signal_number = asyncio.run(server.serve(
                mesh, models=models, origin=origin_of(path), health=health, embedders=vectors,
                up=lambda: print(line, file=sys.stderr, flush=True),
            ))  # fmt: skip
        finally:
            _stop(supervisor, FORCED_STOP_S if signal_number == signal.SIGINT else config.drain_s + FORCED_STOP_S)
        print("stopped; open runs continue with: agentmesh runs resume ID", file=sys.stderr)
        return INTERRUPTED if signal_number == signal.SIGINT else DONE


def _journal_answers(mesh: Mesh) -> bool:
    try:
        run_sync(asyncio.wait_for(mesh.aio.runs(limit=1), REPLY_TIMEOUT_S))
    except (TimeoutError, MeshError):
        return False
    return True


def _embedders(names: Sequence[str]) -> dict[str, Any]:
    """Embedders by name, each tried once; their package is imported only when one is named."""
    embedders = {name: import_module("agentmesh.rag.embedders").embedder(name) for name in names}
    for one in embedders.values():
        assert one.d
    return embedders


def _workers(config: Config, path: str, crew: Crew, processes: int, reports: str) -> Supervisor:
    supervisor = Supervisor(
        worker_commands(config, {path: crew}, processes=processes, suspects="exclude"), drain_s=config.drain_s,
        standby=standby_workers(config, {path: crew}), on_death=release_on_death(config, consumed_queues([crew])),
        env={STATUS_FOLDER_ENV: reports},
    )  # fmt: skip
    supervisor.start()
    return supervisor


def _stop(supervisor: Supervisor | None, drain_s: float) -> None:
    if supervisor is not None:
        supervisor.stop()
        if not supervisor.join(drain_s):
            supervisor.stop(now=True)
            supervisor.join(FORCED_STOP_S)
