"""`provider:name` to a Model, each made once a process; what a model needs is loaded when it is first named."""

import os
import threading
from importlib.util import find_spec
from typing import Any

from agentmesh.definitions.queue import Servers
from agentmesh.errors import ConfigError, ExtraMissing, did_you_mean
from agentmesh.hub.cache import must_be_installed
from agentmesh.model import Model
from agentmesh.models.address import address_of, key_of

PROVIDERS = ("openai", "local")
LOCAL_PACKAGES = ("torch", "transformers", "llguidance", "psutil")


class ModelRegistry:
    """`provider:name` to a Model, each made once a process; a forked child makes its own."""

    def __init__(self) -> None:
        self._made: dict[str | Servers, Model] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __call__(self, wanted: Any) -> tuple[Model, str]:
        """The model and the name it knows.

        Raises:
            ConfigError: no such provider, or something the model needs is missing.
        """
        if hasattr(wanted, "ask"):
            return wanted, type(wanted).__name__
        if self._pid != os.getpid():
            self._made, self._lock, self._pid = {}, threading.Lock(), os.getpid()
        if isinstance(wanted, Servers):
            with self._lock:
                if wanted not in self._made:
                    self._made[wanted] = _make_load_balancer(wanted)
                return self._made[wanted], ""
        provider, _, name = str(wanted).partition(":")
        with self._lock:
            key = "openai" if provider == "openai" else wanted
            if key not in self._made:
                self._made[key] = _make_model(provider, name, wanted)
            return self._made[key], name

    def check(self, wanted: str | Servers) -> None:
        """Whether this model is to be had, without loading what asking it takes: another process does that.

        Raises:
            ConfigError: no such provider, or something the model needs is missing.
        """
        if isinstance(wanted, Servers):
            key_of(wanted)
            return
        provider, _, name = wanted.partition(":")
        if provider == "openai":
            address_of()
        elif provider == "local":
            for package in LOCAL_PACKAGES:
                if not is_importable(package):
                    raise _missing_extra(wanted, package)
            must_be_installed(name)
        else:
            self(wanted)

    async def close(self) -> None:
        """Give back what the models hold on the running loop."""
        for model in list(self._made.values()):
            await model.close()


def _make_load_balancer(servers: Servers) -> Model:
    from agentmesh.models.load_balancer import LoadBalancer

    fleet: Model = LoadBalancer(servers)
    return fleet


def _make_model(provider: str, name: str, wanted: str) -> Model:
    if provider == "openai":
        from agentmesh.models.http import HttpModel

        model: Model = HttpModel()
        return model
    if provider == "local":
        try:
            from agentmesh.models.local import LocalModel
        except ImportError as e:
            raise _missing_extra(wanted, e.name) from None
        local: Model = LocalModel(name)
        return local
    raise ConfigError(
        f"unknown model provider {provider!r} in {wanted!r}",
        hint=f"known providers: {', '.join(PROVIDERS)}."
        f"{did_you_mean(provider, PROVIDERS)} Any OpenAI-compatible server is `openai:NAME` with OPENAI_BASE_URL",
    )


def _missing_extra(wanted: str, package: str | None) -> ExtraMissing:
    return ExtraMissing(
        f"model {wanted!r} needs {package}, which is not installed: pip install 'agentmesh-celery[local]'"
    )


def is_importable(module: str) -> bool:
    """Whether a module could be imported; only its parents are."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
