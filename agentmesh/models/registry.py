"""`provider:name` to a Model, each made once a process; what a model needs is loaded when it is first named."""

import os
import threading
from importlib.util import find_spec
from typing import Any

from agentmesh import plugins
from agentmesh.address import key_of_servers, server_address
from agentmesh.definitions.queue import Servers
from agentmesh.errors import ConfigError, ExtraMissing
from agentmesh.hub.cache import must_be_installed
from agentmesh.model import Model, model_name

LOCAL_PACKAGES = ("torch", "transformers", "llguidance", "psutil")


class ModelRegistry:
    """`provider:name` to a Model, each made once a process; a forked child makes its own."""

    def __init__(self) -> None:
        self._models: dict[str | Servers, Model] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __call__(self, model: Any) -> tuple[Model, str]:
        """The model, and the name that its prompts carry.

        Args:
            model: `provider:name`, a queue's servers, or an object, which is itself.

        Raises:
            ConfigError: no such provider, or something the model needs is missing.
        """
        if hasattr(model, "ask"):
            return model, model_name(model)
        if self._pid != os.getpid():
            self._models, self._lock, self._pid = {}, threading.Lock(), os.getpid()
        key: str | Servers = model if isinstance(model, Servers) else str(model)
        with self._lock:
            if key not in self._models:
                self._models[key] = _make_load_balancer(key) if isinstance(key, Servers) else _make_model(key)
            return self._models[key], "" if isinstance(key, Servers) else key.partition(":")[2]

    def check(self, model: str | Servers) -> None:
        """Check that this model can be had, without loading what a request to it takes: another process does that.

        Raises:
            ConfigError: no such provider, or something the model needs is missing.
        """
        if isinstance(model, Servers):
            key_of_servers(model.key_env, model.urls)
            return
        provider, _, name = model.partition(":")
        if provider == "openai":
            server_address()
        elif provider == "local":
            for package in LOCAL_PACKAGES:
                if not is_importable(package):
                    raise ExtraMissing(
                        f"model {model!r} needs {package}, which is not installed",
                        hint="run: pip install 'agentmesh-celery[local]'",
                    )
            must_be_installed(name)
        else:
            self(model)

    async def close(self) -> None:
        """Close what the models keep open on the running loop."""
        for model in list(self._models.values()):
            await model.close()


def _make_load_balancer(servers: Servers) -> Model:
    from agentmesh.models.load_balancer import LoadBalancer

    return LoadBalancer(servers)


def _make_model(name: str) -> Model:
    provider, _, rest = name.partition(":")
    hint = "A server with OpenAI's API is `openai:NAME`, with its URL in OPENAI_BASE_URL."
    model: Model = plugins.make_plugin("models", provider, rest, hint=hint)
    if not hasattr(model, "ask"):
        raise ConfigError(
            f"model provider {provider!r} makes a {type(model).__name__}, which has no `ask`",
            hint="declare a subclass of agentmesh.model.Model",
        )
    return model


def is_importable(module: str) -> bool:
    """Whether a module could be imported; only its parents are."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
