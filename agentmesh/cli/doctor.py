"""`agentmesh doctor`: everything a run needs, looked at one by one; what is wrong comes with its mend."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentmesh.boot import check_models, load_crew, place
from agentmesh.celery.app import check_broker, journal_url, make_app
from agentmesh.celery.links import BROKEN
from agentmesh.celery.loop import drive
from agentmesh.celery.rabbit import DELIVERY_LIMIT, Facts, on_rabbit
from agentmesh.celery.rabbit import examine as rabbit_facts
from agentmesh.celery.settings import is_amqp
from agentmesh.cli.cards import card_findings, driver, queue_findings, torch_findings
from agentmesh.cli.finding import Finding, say
from agentmesh.config import Config, load
from agentmesh.crew import Crew
from agentmesh.errors import MeshError
from agentmesh.journals.redis import RedisJournal
from agentmesh.models.cache import installed
from agentmesh.models.fleet import Fleet

EXTRAS = {
    "local": ("torch", "transformers", "safetensors", "gguf"),
    "rag": ("faiss", "numpy"),
    "langchain": ("langchain_core",),
    "serve": ("starlette", "uvicorn"),
    "notebook": ("ipykernel",),
}
CLASHES = {"agents": "openai-agents", "tools": "a package of that name"}


def examine(crew: str, *, broker: str, file: Path | None) -> int:
    """Print every finding; 0 when nothing needs mending."""
    return say(_findings(crew, broker, file))


def _findings(crew: str, broker: str, file: Path | None) -> Iterator[Finding]:
    new_enough = sys.version_info >= (3, 11)
    yield Finding(
        new_enough, f"Python {platform.python_version()}", "" if new_enough else "install Python 3.11 or newer"
    )
    yield from _packages()
    yield from _names()
    try:
        config = load(file=file, broker=broker or None)
    except MeshError as e:
        yield Finding(False, "settings", e.message)
        return
    yield from _servers(config)
    yield from _models(config)
    at = driver()
    yield from card_findings(at)
    loaded = None
    if crew:
        try:
            loaded = load_crew(crew)
        except MeshError as e:
            yield Finding(False, f"crew {crew}", e.message)
    local = loaded is not None and any(m.startswith("local:") for m in loaded.models(config.model))
    yield from torch_findings(at, wanted=local)
    if loaded is not None:
        yield from _crew(crew, loaded, config)


def _packages() -> Iterator[Finding]:
    for name in ("celery", "redis", "kombu"):
        yield Finding(True, f"{name} {importlib.metadata.version(name)}")
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        mend = f"only if you need it: pip install 'agentmesh-celery[{extra}]'" if missing else ""
        yield Finding(
            True, f"extra {extra}: {'not installed (' + ', '.join(missing) + ')' if missing else 'installed'}", mend
        )


def _names() -> Iterator[Finding]:
    """Modules whose names are easily taken by somebody else's package."""
    for name in ("agentmesh", "agentmesh_agents", "agentmesh_tools"):
        spec = importlib.util.find_spec(name)
        ours = spec is not None
        yield Finding(
            ours,
            f"module {name}: {spec.origin if spec else 'not found'}",
            "" if ours else "pip install agentmesh-celery",
        )
    for name, owner in CLASHES.items():
        if Path(f"{name}.py").exists():
            yield Finding(False, f"{name}.py in this folder hides {owner}", f"rename {name}.py")


def _servers(config: Config) -> Iterator[Finding]:
    try:
        config, valkey = place(config)
    except MeshError as e:
        yield Finding(False, "embedded Valkey", e.message)
        return
    try:
        app = make_app(config.broker)
        check_broker(app)
        if on_rabbit(app):
            yield Finding(True, f"broker: RabbitMQ {rabbit_facts(app, ()).version} answers")
        if valkey is not None:
            yield Finding(True, f"embedded Valkey in {config.home}: answers, and evicts nothing")
        elif not on_rabbit(app):
            yield Finding(True, "broker: answers, and evicts nothing")
        yield from drive(_journal(RedisJournal(journal_url(config.broker, config.journal))))
    except MeshError as e:
        yield Finding(False, "broker", e.message)
    finally:
        if valkey is not None:
            valkey.leave()


async def _journal(journal: RedisJournal) -> list[Finding]:
    info: Any = await journal.pipe.ask("INFO", "everything")
    facts = dict(line.split(":", 1) for line in str(info).splitlines() if ":" in line and not line.startswith("#"))
    await journal.close()
    aof = facts.get("aof_enabled") == "1"
    server = (
        f"journal: {facts.get('server_name', 'redis')} {facts.get('valkey_version', facts.get('redis_version', '?'))}"
    )
    cluster = facts.get("cluster_enabled") == "1"
    return [
        Finding(aof, f"{server}, append-only file {'on' if aof else 'off'}",
                "" if aof else "set `appendonly yes`: without it a restart of the server loses every open run"),
        Finding(not cluster, f"cluster mode {'on' if cluster else 'off'}",
                "use a single node with replicas: one script writes many keys" if cluster else ""),
    ]  # fmt: skip


def _queues(facts: Facts) -> Iterator[Finding]:
    for queue, waiting in facts.messages.items():
        told = facts.other.get(queue)
        mend = f"it is used as it is; for a quorum queue with delivery limit {DELIVERY_LIMIT} stop the workers and delete it"
        yield Finding(
            told is None, f"queue {queue}: {waiting} messages wait; {told or 'quorum, as agentmesh makes it'}",
            mend if told else "",
        )  # fmt: skip


def _models(config: Config) -> Iterator[Finding]:
    here = [m.name for m in installed()]
    wanted = config.model.partition(":")[2] if config.model.startswith("local:") else ""
    missing = bool(wanted) and wanted not in here
    yield Finding(
        not missing, f"local models: {', '.join(here) or 'none'}", f"agentmesh models pull {wanted}" if missing else ""
    )
    has_key = bool(os.environ.get("OPENAI_API_KEY"))
    yield Finding(
        True,
        f"OPENAI_API_KEY {'is set' if has_key else 'is not set'}",
        "" if has_key else "only `openai:` models need it",
    )


async def _model_servers(queue: str, fleet: Fleet) -> list[Finding]:
    found = await fleet.examine()
    await fleet.close()
    return [
        Finding(not ails, f"queue {queue!r}: model server {url} {'answers' if not ails else f'does not answer ({ails})'}",
                "start it, or take it out of the queue's url" if ails else "")
        for url, ails in found.items()
    ]  # fmt: skip


def _crew(path: str, crew: Crew, config: Config) -> Iterator[Finding]:
    yield Finding(
        True, f"crew {crew.name!r}: agents {', '.join(crew.agents)}; queues {', '.join(crew.broker_queues())}"
    )
    yield from queue_findings(crew)
    try:
        check_models(crew, config)
        for queue in crew.queues.values():
            if queue.servers is not None:
                yield from drive(_model_servers(queue.name, Fleet(queue.servers)))
        yield Finding(True, "its models can be reached from here")
        if is_amqp(config.broker):
            with suppress(*BROKEN):  # that it does not answer is said above
                yield from _queues(rabbit_facts(make_app(config.broker), crew.broker_queues()))
    except MeshError as e:
        yield Finding(False, f"crew {path}", e.message)
