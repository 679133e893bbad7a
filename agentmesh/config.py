"""Every setting, typed and frozen: default < `[tool.agentmesh]` or agentmesh.toml < `AGENTMESH_*` < arguments."""

import logging
import os
import tomllib
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from agentmesh.errors import ConfigError, did_you_mean

log = logging.getLogger("agentmesh")
ENV_PREFIX = "AGENTMESH_"
SIMILARITY = 0.75  # other variables may begin with ENV_PREFIX too, such as one that holds a key


class Config(BaseSettings):
    """Where broker and journal are, and agentmesh's times. Secrets are not settings: they stay in the environment.

    Args:
        broker: Celery's broker URL; empty starts an embedded Valkey.
        journal: `redis://…`, `unix://…` or the scheme of a plugin; empty is the broker when that is Redis or Valkey,
            else an embedded Valkey.
        prefix: of each of the journal's keys.
        home: the folder of the embedded Valkey.
        model: `provider:name`, for agents and crews that name none.
        lease_s: after this time without renewal another worker may claim a step.
        sweep_s: between two sweeps of a worker for due and lost entries.
        drain_s: how long the steps of a stopping worker may take to end.
        retain_days: how long an ended run is kept.
        history_cache_mb: MiB of each worker process for the events of recent runs; less means more reads of the journal.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    broker: str = ""
    journal: str = ""
    prefix: str = "agentmesh:"
    home: Path = Path(".agentmesh")
    model: str = "local:smollm2"
    lease_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    sweep_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    retain_days: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    history_cache_mb: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 64.0

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource, file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        """Arguments, then the environment; `load_config` adds the file below them."""
        return init_settings, env_settings


def load_config(*, file: Path | None = None, **arguments: Any) -> Config:
    """The configuration of this folder; arguments that are None are left out. Warns of a variable that looks misspelt.

    Raises:
        ConfigError: a key or value is wrong; the error names the nearest known key.
    """
    for name in os.environ:
        if name.startswith(ENV_PREFIX):
            _warn_if_misspelt(name)
    settings = {k: v for k, v in arguments.items() if v is not None}
    path, from_file = _nearest_file(file or Path.cwd()) if file is None else (file, _read_settings(file) or {})
    unknown = sorted(set(from_file) - set(Config.model_fields))
    if unknown:
        raise ConfigError(
            f"{path}: unknown setting {unknown[0]!r}",
            hint=f"use one of: {', '.join(Config.model_fields)}.{did_you_mean(unknown[0], Config.model_fields)}",
        )
    try:
        from_environment = set(Config().model_fields_set)
        return Config(**{**{k: v for k, v in from_file.items() if k not in from_environment}, **settings})
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        raise ConfigError(
            f"setting {name!r} is {first['input']!r}: {first['msg']}",
            hint=f"correct {ENV_PREFIX}{name.upper()}, or the file",
        ) from None


@lru_cache(maxsize=64)
def _warn_if_misspelt(variable: str) -> None:
    """Warn once of a variable whose name is nearly that of a setting."""
    name = variable.removeprefix(ENV_PREFIX).lower()
    if name not in Config.model_fields and (
        near := get_close_matches(name, Config.model_fields, n=1, cutoff=SIMILARITY)
    ):
        log.warning(
            "the environment variable %s is not a setting. Did you mean %s%s?", variable, ENV_PREFIX, near[0].upper()
        )


@lru_cache(maxsize=8)
def _nearest_file(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The nearest agentmesh.toml or `[tool.agentmesh]` at or above a folder."""
    for above in (folder, *folder.parents):
        own, project = above / "agentmesh.toml", above / "pyproject.toml"
        if own.is_file():
            return own, _read_settings(own) or {}
        if project.is_file() and (settings := _read_settings(project)) is not None:
            return project, settings
    return None, {}


def _read_settings(path: Path) -> dict[str, Any] | None:
    """What a file sets; None for a pyproject.toml without a table of ours."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as e:
        raise ConfigError(
            f"cannot read {path}: {e.strerror}", hint="name a file that is there, with --config"
        ) from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path} is not TOML: {e}", hint="correct that line") from None
    settings: dict[str, Any] | None = data.get("tool", {}).get("agentmesh") if path.name == "pyproject.toml" else data
    return settings
