"""`provider:name` to a Model, each made once a process; what a model needs is loaded when it is first named."""

import os
import threading
from importlib.util import find_spec
from typing import Any

from agentmesh.errors import ConfigError, ExtraMissing, did_you_mean
from agentmesh.model import Model
from agentmesh.models.address import address_of, key_of
from agentmesh.models.cache import must_be_installed
from agentmesh.queue import Servers

PROVIDERS = ("openai", "local")
FOR_LOCAL = ("torch", "transformers", "llguidance", "psutil")


class Models:
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
                    self._made[wanted] = _make_fleet(wanted)
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
            for package in FOR_LOCAL:
                if not findable(package):
                    raise _lacks(wanted, package)
            must_be_installed(name)
        else:
            self(wanted)

    async def close(self) -> None:
        """Give back what the models hold on the running loop."""
        for model in list(self._made.values()):
            await model.close()


def _make_fleet(servers: Servers) -> Model:
    from agentmesh.models.fleet import Fleet

    fleet: Model = Fleet(servers)
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
            raise _lacks(wanted, e.name) from None
        local: Model = LocalModel(name)
        return local
    raise ConfigError(
        f"there is no model provider {provider!r} in {wanted!r}; there are {', '.join(PROVIDERS)}."
        f"{did_you_mean(provider, PROVIDERS)} Any OpenAI-compatible server is `openai:NAME` with OPENAI_BASE_URL"
    )


def _lacks(wanted: str, package: str | None) -> ExtraMissing:
    return ExtraMissing(
        f"model {wanted!r} needs {package}, which is not installed: pip install 'agentmesh-celery[local]'"
    )


def findable(module: str) -> bool:
    """Whether a module could be imported; only its parents are."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False
