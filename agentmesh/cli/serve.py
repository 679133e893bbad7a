"""`agentmesh serve`: an OpenAI-compatible endpoint over a crew, with supervised workers of its own."""

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

from agentmesh.boot import check_models, listener, load_crew, place
from agentmesh.celery.supervise import Supervisor
from agentmesh.cli.child import specs_of
from agentmesh.cli.embedding import taken_by
from agentmesh.cli.endpoint import Health
from agentmesh.cli.exits import DONE, INTERRUPTED
from agentmesh.cli.run import origin_of
from agentmesh.cli.spares import spares_of
from agentmesh.cli.worker import answers, folder, giver_back, where
from agentmesh.config import Config, load
from agentmesh.crew import Crew
from agentmesh.mesh import Mesh
from agentmesh.models.named import Models
from agentmesh.report import REPORTS_IN, reports_in

HURRY_S = 2.0  # what Ctrl-C lets workers have for what they do; SIGTERM gives them `drain_s`


def serve_crew(
    path: str, *, host: str, port: int, key_env: str, embed: Sequence[str], processes: int, broker: str, model: str,
    file: Path | None,
) -> int:  # fmt: skip
    """Serve until stopped; runs that are not through then are resumable."""
    crew = load_crew(path)
    asked = load(file=file, broker=broker or None, model=model or None)
    check_models(crew, asked)
    at = listener(host, port, key_env)  # what is wrong with the address is said before anything is started
    vectors = _embedders(embed)
    with ExitStack() as stack:
        config, valkey = place(asked)
        if valkey is not None:
            stack.callback(valkey.leave)
        mesh = Mesh(crew, config=config, models=Models())
        mesh.check()
        stack.callback(mesh.close)
        reports = stack.enter_context(folder()) if processes else ""
        supervisor = _workers(config, path, crew, processes, reports) if processes else None

        def health() -> tuple[bool, dict[str, Any]]:
            wanted, ready = supervisor.health if supervisor is not None else (0, 0)
            engines = reports_in(reports, supervisor.names) if supervisor is not None else ()
            now = Health(wanted, ready, journal=answers(mesh.journal), engines=engines)
            return now.good, now.numbers

        models = crew.models(config.model)
        key = f"key from {key_env}" if at.key else "no key, for this machine alone"
        line = (f"crew {crew.name} · {at.url}/v1 · models {', '.join([*crew.agents, *models, *vectors])} · {key} · "
                f"workers {supervisor.health[0] if supervisor is not None else 'elsewhere'} · {where(config, valkey)}")  # fmt: skip
        heard = 0
        try:
            heard = asyncio.run(at.serve(
                mesh, models=models, origin=origin_of(path), health=health, embedders=vectors,
                up=lambda: print(line, file=sys.stderr, flush=True),
            ))  # fmt: skip
        finally:
            _stop(supervisor, HURRY_S if heard == signal.SIGINT else config.drain_s + HURRY_S)
        print("stopped; runs that were under way go on with: agentmesh runs resume ID", file=sys.stderr)
        return INTERRUPTED if heard == signal.SIGINT else DONE


def _embedders(names: Sequence[str]) -> dict[str, Any]:
    """Embedders by name, each tried once; the room is imported only when one is named."""
    found = {name: import_module("agentmesh.rag.embed").embedder(name) for name in names}
    for one in found.values():
        assert one.d
    return found


def _workers(config: Config, path: str, crew: Crew, processes: int, reports: str) -> Supervisor:
    supervisor = Supervisor(
        specs_of(config, {path: crew}, processes=processes, suspects="elsewhere"), drain_s=config.drain_s,
        spares=spares_of(config, {path: crew}), on_death=giver_back(config, taken_by([crew])),
        env={REPORTS_IN: reports},
    )  # fmt: skip
    supervisor.start()
    return supervisor


def _stop(supervisor: Supervisor | None, drain_s: float) -> None:
    if supervisor is not None:
        supervisor.stop()
        if not supervisor.join(drain_s):
            supervisor.stop(now=True)
            supervisor.join(HURRY_S)
