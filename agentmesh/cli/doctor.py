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

from agentmesh.celery.app import is_amqp, journal_url, make_app
from agentmesh.celery.broker import check_broker
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.publish_connection import CONNECTION_ERRORS
from agentmesh.celery.rabbitmq import DELIVERY_LIMIT, BrokerFacts, on_rabbit
from agentmesh.celery.rabbitmq import inspect_broker as rabbit_facts
from agentmesh.cli.checks import Check, check_gpus, check_queues, check_torch, print_checks, query_driver
from agentmesh.config import Config, load
from agentmesh.definitions.crew import Crew
from agentmesh.errors import MeshError
from agentmesh.hub.cache import installed
from agentmesh.journal.redis import RedisJournal
from agentmesh.models.load_balancer import LoadBalancer
from agentmesh.runtime.bootstrap import check_models, resolve_servers
from agentmesh.runtime.crew_file import load_crew

EXTRAS = {
    "local": ("torch", "transformers", "safetensors", "gguf"),
    "rag": ("faiss", "numpy"),
    "langchain": ("langchain_core",),
    "serve": ("starlette", "uvicorn"),
    "notebook": ("ipykernel",),
}
CLASHES = {"agents": "openai-agents", "tools": "a package of that name"}


def run_doctor(crew: str, *, broker: str, file: Path | None) -> int:
    """Print every finding; 0 when nothing needs mending."""
    return print_checks(_checks(crew, broker, file))


def _checks(crew: str, broker: str, file: Path | None) -> Iterator[Check]:
    new_enough = sys.version_info >= (3, 11)
    yield Check(new_enough, f"Python {platform.python_version()}", "" if new_enough else "install Python 3.11 or newer")
    yield from _packages()
    yield from _names()
    try:
        config = load(file=file, broker=broker or None)
    except MeshError as e:
        yield Check(False, "settings", str(e))
        return
    yield from _servers(config)
    yield from _models(config)
    at = query_driver()
    yield from check_gpus(at)
    loaded = None
    if crew:
        try:
            loaded = load_crew(crew)
        except MeshError as e:
            yield Check(False, f"crew {crew}", str(e))
    local = loaded is not None and any(m.startswith("local:") for m in loaded.models(config.model))
    yield from check_torch(at, wanted=local)
    if loaded is not None:
        yield from _crew(crew, loaded, config)


def _packages() -> Iterator[Check]:
    for name in ("celery", "redis", "kombu"):
        yield Check(True, f"{name} {importlib.metadata.version(name)}")
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        mend = f"only if you need it: pip install 'agentmesh-celery[{extra}]'" if missing else ""
        yield Check(
            True, f"extra {extra}: {'not installed (' + ', '.join(missing) + ')' if missing else 'installed'}", mend
        )


def _names() -> Iterator[Check]:
    """Modules whose names are easily taken by somebody else's package."""
    for name in ("agentmesh", "agentmesh_agents", "agentmesh_tools"):
        spec = importlib.util.find_spec(name)
        ours = spec is not None
        yield Check(
            ours,
            f"module {name}: {spec.origin if spec else 'not found'}",
            "" if ours else "pip install agentmesh-celery",
        )
    for name, owner in CLASHES.items():
        if Path(f"{name}.py").exists():
            yield Check(False, f"{name}.py in this folder hides {owner}", f"rename {name}.py")


def _servers(config: Config) -> Iterator[Check]:
    try:
        config, valkey = resolve_servers(config)
    except MeshError as e:
        yield Check(False, "embedded Valkey", str(e))
        return
    try:
        app = make_app(config.broker)
        check_broker(app)
        if on_rabbit(app):
            yield Check(True, f"broker: RabbitMQ {rabbit_facts(app, ()).version} answers")
        if valkey is not None:
            yield Check(True, f"embedded Valkey in {config.home}: responds, eviction off")
        elif not on_rabbit(app):
            yield Check(True, "broker: responds, eviction off")
        yield from run_sync(_journal(RedisJournal(journal_url(config.broker, config.journal))))
    except MeshError as e:
        yield Check(False, "broker", str(e))
    finally:
        if valkey is not None:
            valkey.leave()


async def _journal(journal: RedisJournal) -> list[Check]:
    info: Any = await journal.connection.ask("INFO", "everything")
    facts = dict(line.split(":", 1) for line in str(info).splitlines() if ":" in line and not line.startswith("#"))
    await journal.close()
    aof = facts.get("aof_enabled") == "1"
    server = (
        f"journal: {facts.get('server_name', 'redis')} {facts.get('valkey_version', facts.get('redis_version', '?'))}"
    )
    cluster = facts.get("cluster_enabled") == "1"
    return [
        Check(aof, f"{server}, append-only file {'on' if aof else 'off'}",
                "" if aof else "set `appendonly yes`: without it a restart of the server loses every open run"),
        Check(not cluster, f"cluster mode {'on' if cluster else 'off'}",
                "use a single node with replicas: one script writes many keys" if cluster else ""),
    ]  # fmt: skip


def _queues(facts: BrokerFacts) -> Iterator[Check]:
    for queue, waiting in facts.messages.items():
        difference = facts.other.get(queue)
        mend = f"it is used as it is; for a quorum queue with delivery limit {DELIVERY_LIMIT} stop the workers and delete it"
        yield Check(
            difference is None, f"queue {queue}: {waiting} messages wait; {difference or 'quorum, as agentmesh makes it'}",
            mend if difference else "",
        )  # fmt: skip


def _models(config: Config) -> Iterator[Check]:
    here = [m.name for m in installed()]
    model_name = config.model.partition(":")[2] if config.model.startswith("local:") else ""
    missing = bool(model_name) and model_name not in here
    yield Check(
        not missing,
        f"local models: {', '.join(here) or 'none'}",
        f"agentmesh models pull {model_name}" if missing else "",
    )
    has_key = bool(os.environ.get("OPENAI_API_KEY"))
    yield Check(
        True,
        f"OPENAI_API_KEY {'is set' if has_key else 'is not set'}",
        "" if has_key else "only `openai:` models need it",
    )


async def _model_servers(queue: str, fleet: LoadBalancer) -> list[Check]:
    status = await fleet.check_servers()
    await fleet.close()
    return [
        Check(not ails, f"queue {queue!r}: model server {url} {'answers' if not ails else f'does not answer ({ails})'}",
                "start it, or take it out of the queue's url" if ails else "")
        for url, ails in status.items()
    ]  # fmt: skip


def _crew(path: str, crew: Crew, config: Config) -> Iterator[Check]:
    yield Check(True, f"crew {crew.name!r}: agents {', '.join(crew.agents)}; queues {', '.join(crew.broker_queues())}")
    yield from check_queues(crew)
    try:
        check_models(crew, config)
        for queue in crew.queues.values():
            if queue.servers is not None:
                yield from run_sync(_model_servers(queue.name, LoadBalancer(queue.servers)))
        yield Check(True, "its models can be reached from here")
        if is_amqp(config.broker):
            with suppress(*CONNECTION_ERRORS):  # that it does not answer is said above
                yield from _queues(rabbit_facts(make_app(config.broker), crew.broker_queues()))
    except MeshError as e:
        yield Check(False, f"crew {path}", str(e))
