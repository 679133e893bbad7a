"""Settings become servers, journals and meshes; what a crew needs is checked before a run begins."""

from typing import TYPE_CHECKING, Any

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.step import Ask
from agentmesh.journal.journal import Journal
from agentmesh.models.registry import ModelRegistry

if TYPE_CHECKING:
    from agentmesh.config import Config
    from agentmesh.mesh import Mesh
    from agentmesh.runtime.valkey import EmbeddedValkey


def check_models(crew: Crew, config: "Config") -> None:
    """Look after every model the crew names, so that what is missing is said before a run begins.

    Raises:
        ConfigError: a provider, a key, a package or a model's files are missing.
    """
    models = ModelRegistry()
    asking = [
        (a, crew.queues.servers_of(Ask(a.name, a.model or "", queue=a.queue), config.model))
        for a in crew.agents.values()
        if _asks_named_model(a, crew)
    ]
    for servers in {s for _, s in asking if s is not None}:
        models.check(servers)
    for model in {str(a.model or crew.model or config.model) for a, servers in asking if servers is None}:
        models.check(model)


def _asks_named_model(agent: Agent[Any, Any], crew: Crew) -> bool:
    """Whether the agent may ask a model that is named by text; a flow of its own may ask none."""
    return type(agent).flow is Agent.flow and not hasattr(agent.model or crew.model, "ask")


# ---- meshes ------------------------------------------------------------------------------------
def resolve_servers(config: "Config") -> "tuple[Config, EmbeddedValkey | None]":
    """Settings that say where messages and journal are: what is not named is in the embedded Valkey, which is joined."""
    from agentmesh.celery.app import is_amqp

    if config.broker and (config.journal or not is_amqp(config.broker)):
        return config, None
    from agentmesh.runtime.valkey import EmbeddedValkey

    valkey = EmbeddedValkey.join(config.home)
    if config.broker:
        return config.model_copy(update={"journal": valkey.url}), valkey
    return config.model_copy(update={"broker": valkey.broker_url, "journal": config.journal or valkey.url}), valkey


def open_journal(config: "Config") -> "tuple[Config, Journal, EmbeddedValkey | None]":
    """The journal alone, for whoever only reads and tells; needs no crew."""
    from agentmesh.celery.app import make_app
    from agentmesh.mesh import make_journal

    config, valkey = resolve_servers(config)
    return config, make_journal(config, make_app(config.broker)), valkey


def make_mesh(crew: Crew, config: "Config", *, worker: str = "") -> "tuple[Mesh, EmbeddedValkey | None]":
    """A mesh for a crew: on the configured servers, or on the embedded Valkey."""
    from agentmesh.mesh import Mesh

    config, valkey = resolve_servers(config)
    return Mesh(crew, config=config, models=ModelRegistry(), worker=worker), valkey
