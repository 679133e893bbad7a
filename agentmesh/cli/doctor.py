"""`agentmesh doctor`: everything a run needs, checked one by one; each problem comes with one thing to do."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentmesh import plugins
from agentmesh.celery.app import is_amqp, make_app
from agentmesh.celery.broker import check_broker
from agentmesh.celery.event_loop import run_sync
from agentmesh.celery.journal_factory import make_journal
from agentmesh.celery.publish_connection import CONNECTION_ERRORS
from agentmesh.celery.rabbitmq import DELIVERY_LIMIT, BrokerFacts, inspect_broker, on_rabbit
from agentmesh.cli.checks import Check, check_gpus, check_queues, check_torch, print_checks, query_driver
from agentmesh.config import Config, load_config
from agentmesh.definitions.crew import Crew, models_of
from agentmesh.definitions.queue import ServerQueue
from agentmesh.errors import ConfigError, MeshError
from agentmesh.hub.cache import installed_models
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
    """Print every check; 0 when all are ok, else 4."""
    return print_checks(_checks(crew, broker, file))


def _checks(crew: str, broker: str, file: Path | None) -> Iterator[Check]:
    new_enough = sys.version_info >= (3, 11)
    yield Check(new_enough, f"Python {platform.python_version()}", "" if new_enough else "install Python 3.11 or newer")
    yield from _packages()
    yield from _names()
    try:
        config = load_config(file=file, broker=broker or None)
    except MeshError as e:
        yield Check.of_error(e, where="settings")
        return
    yield from _servers(config)
    yield from _models(config)
    yield from _plugins()
    driver = query_driver()
    yield from check_gpus(driver)
    loaded = None
    if crew:
        try:
            loaded = load_crew(crew)
        except MeshError as e:
            yield Check.of_error(e, where=f"crew {crew}")
    local = loaded is not None and any(m.startswith("local:") for m in models_of(loaded, config.model))
    yield from check_torch(driver, needed=local)
    if loaded is not None:
        yield from _crew(crew, loaded, config)


def _packages() -> Iterator[Check]:
    for name in ("celery", "redis", "kombu"):
        yield Check(True, f"{name} {importlib.metadata.version(name)}")
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        yield Check(
            True, f"extra {extra}: {'not installed (' + ', '.join(missing) + ')' if missing else 'installed'}",
            f"only if you need it: pip install 'agentmesh-celery[{extra}]'" if missing else "",
        )  # fmt: skip


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
        yield Check.of_error(e, where="embedded Valkey")
        return
    try:
        app = make_app(config.broker)
        check_broker(app)
        if on_rabbit(app):
            yield Check(True, f"broker: RabbitMQ {inspect_broker(app, ()).version} responds")
        if valkey is not None:
            yield Check(True, f"embedded Valkey in {config.home}: responds, eviction off")
        elif not on_rabbit(app):
            yield Check(True, "broker: responds, eviction off")
        journal = make_journal(config, app)
        if isinstance(journal, RedisJournal):
            yield from run_sync(_journal(journal))
    except MeshError as e:
        yield Check.of_error(e, where="broker")
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
        Check(aof, f"{server}, append-only file {'on' if aof else 'off: a restart of the server loses every open run'}",
                "" if aof else "set `appendonly yes` in its configuration"),
        Check(not cluster, f"cluster mode {'on: one script writes keys of several nodes' if cluster else 'off'}",
                "use a single node with replicas" if cluster else ""),
    ]  # fmt: skip


def _queues(facts: BrokerFacts) -> Iterator[Check]:
    for queue, waiting in facts.messages.items():
        difference = facts.other.get(queue)
        declared = (
            f"used although it is declared otherwise ({difference})"
            if difference
            else "a quorum queue as we declare it"
        )
        hint = f"stop the workers and delete it, to get a quorum queue with delivery limit {DELIVERY_LIMIT}"
        yield Check(
            difference is None, f"queue {queue}: {waiting} messages wait, {declared}", hint if difference else ""
        )


def _models(config: Config) -> Iterator[Check]:
    names = [m.name for m in installed_models()]
    model_name = config.model.partition(":")[2] if config.model.startswith("local:") else ""
    missing = bool(model_name) and model_name not in names
    yield Check(
        not missing,
        f"local models: {', '.join(names) or 'none'}",
        f"agentmesh models pull {model_name}" if missing else "",
    )
    has_key = bool(os.environ.get("OPENAI_API_KEY"))
    yield Check(
        True,
        f"OPENAI_API_KEY {'is set' if has_key else 'is not set'}",
        "" if has_key else "only `openai:` models need it",
    )


def _plugins() -> Iterator[Check]:
    """What installed packages bring, each imported once."""
    for group, noun in plugins.NOUNS.items():
        for entry in plugins.installed_plugins(group):
            label = f"{noun} {entry.name!r} of {plugins.package_of(entry)}"
            if entry.name in plugins.BUILT_IN[group]:
                yield Check(False, f"{label} is not used: agentmesh has one of this name", "uninstall the package")
                continue
            try:
                plugins.load_plugin(group, entry.name)
                yield Check(True, f"{label} can be imported")
            except ConfigError as e:
                yield Check(False, e.message, e.hint)


async def _model_servers(queue: str, balancer: LoadBalancer) -> list[Check]:
    status = await balancer.check_servers()
    await balancer.close()
    return [
        Check(not reason, f"queue {queue!r}: model server {url} {f'does not respond ({reason})' if reason else 'responds'}",
              "start it, or remove it from the queue's urls" if reason else "")
        for url, reason in status.items()
    ]  # fmt: skip


def _crew(path: str, crew: Crew, config: Config) -> Iterator[Check]:
    yield Check(
        True, f"crew {crew.name!r}: agents {', '.join(crew.agents)}; queues {', '.join(crew.queues.broker_names())}"
    )
    yield from check_queues(crew)
    try:
        check_models(crew, config)
        for queue in crew.queues.values():
            if isinstance(queue, ServerQueue):
                yield from run_sync(_model_servers(queue.name, LoadBalancer(queue.servers)))
        yield Check(True, "its models can be reached from here")
        if is_amqp(config.broker):
            with suppress(*CONNECTION_ERRORS):  # _servers has reported it
                yield from _queues(inspect_broker(make_app(config.broker), crew.queues.broker_names()))
    except MeshError as e:
        yield Check.of_error(e, where=f"crew {path}")
