"""Models, stores, journals, embedders and loaders by name: ours and those of installed packages, in one table.

A package declares an object in an entry-point group: `agentmesh.models`, `agentmesh.stores`, `agentmesh.journals`,
`agentmesh.embedders`, `agentmesh.loaders` (docs/guides/plugins.md has one of each). Ours have the same form and
are written down here, because the metadata of a checkout may be old. The metadata of installed packages is read once in
each process, and only for a name that is not ours.
"""

import logging
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from agentmesh.errors import ConfigError, ExtraMissing, MeshError, did_you_mean

log = logging.getLogger("agentmesh.plugins")

Group = Literal["models", "stores", "journals", "embedders", "loaders"]
NOUNS: Mapping[Group, str] = {
    "models": "model provider", "stores": "store", "journals": "journal scheme", "embedders": "embedder",
    "loaders": "loader",
}  # fmt: skip

_REDIS = "agentmesh.journal.redis:RedisJournal"
_LOADERS = "agentmesh.rag.loaders"
_TEXT = ("txt", "text", "log", "rst", "adoc", "org", "tex", "py", "js", "ts", "java", "go", "rs", "c", "h", "cpp",
         "sh", "sql", "toml", "yaml", "yml", "json")  # fmt: skip
# `module:attribute [extra]`, as in an entry point; the extra has the packages that the module imports
BUILT_IN: Mapping[Group, Mapping[str, str]] = {
    "models": {
        "openai": "agentmesh.models.http:HttpModel",
        "local": "agentmesh.models.local:LocalModel [local]",
    },
    "stores": {"faiss": "agentmesh.rag.store.faiss_store:FaissStore [rag]"},
    "journals": dict.fromkeys(("redis", "rediss", "unix", "valkey", "valkeys", "redis+socket"), _REDIS),
    "embedders": {
        "wordllama": "agentmesh.rag.embedders.wordllama:WordLlama [rag]",
        "local": "agentmesh.rag.embedders.encoder:Encoder [local,rag]",
        "openai": "agentmesh.rag.embedders.http:openai [rag]",
        "http": "agentmesh.rag.embedders.http:http [rag]",
        "https": "agentmesh.rag.embedders.http:https [rag]",
    },
    "loaders": {
        **dict.fromkeys(_TEXT, f"{_LOADERS}:read_text"),
        **dict.fromkeys(("md", "markdown", "mdx"), f"{_LOADERS}:read_markdown"),
        **dict.fromkeys(("csv", "tsv"), f"{_LOADERS}.table:read_csv"),
        **dict.fromkeys(("jsonl", "ndjson"), f"{_LOADERS}.table:read_json_lines"),
        **dict.fromkeys(("html", "htm", "xhtml"), f"{_LOADERS}.html:read [rag]"),
        "pdf": f"{_LOADERS}.pdf:read [rag]",
    },
}


def load_plugin(group: Group, name: str, *, hint: str = "") -> Any:
    """The object that a name stands for: ours, or what an installed package declares under it.

    Args:
        hint: what else to do about an unknown name.

    Raises:
        ConfigError: the name is unknown, two packages declare it, or what it stands for cannot be imported.
        ExtraMissing: it is ours, and a package that it imports is not installed.
    """
    entry = find(group, name)
    if entry is None:
        raise ConfigError(
            f"unknown {NOUNS[group]} {name!r}",
            hint=f"use one of: {', '.join(names(group))}.{did_you_mean(name, names(group))} {hint}".rstrip(),
        )
    try:
        return entry.load()
    except MeshError:
        raise
    except (Exception, SystemExit) as e:  # a package must not end the process that names it
        raise _load_error(group, entry, e) from e


def make_plugin(group: Group, name: str, *arguments: Any, hint: str = "", **settings: Any) -> Any:
    """What `load_plugin` gives, called with these arguments.

    Raises:
        ConfigError: see `load_plugin`; or the call raised something else than a MeshError.
    """
    factory = load_plugin(group, name, hint=hint)
    try:
        return factory(*arguments, **settings)
    except MeshError:
        raise
    except (Exception, SystemExit) as e:  # a package must not end the process that names it
        maker = getattr(factory, "__name__", repr(factory))
        raise ConfigError(
            f"the {NOUNS[group]} {name!r} cannot be made: {maker} raised {type(e).__name__}: {e}",
            hint=f"correct what {maker} does with its arguments; docs/guides/plugins.md says which it gets",
        ) from e


def find(group: Group, name: str) -> EntryPoint | None:
    """The entry of a name, without importing what it points to; None for an unknown name.

    Raises:
        ConfigError: two packages declare it.
    """
    if name in BUILT_IN[group]:
        return EntryPoint(name, BUILT_IN[group][name], f"agentmesh.{group}")
    entries = _installed(group).get(name, [])
    if len(entries) > 1:
        raise ConfigError(
            f"several packages declare the {NOUNS[group]} {name!r}: {', '.join(map(package_of, entries))}",
            hint="uninstall all but one",
        )
    return entries[0] if entries else None


def names(group: Group) -> list[str]:
    """Every known name, sorted."""
    return sorted({*BUILT_IN[group], *_installed(group)})


def installed_plugins(group: Group) -> list[EntryPoint]:
    """What installed packages declare, including names that are not used because they are ours."""
    return [entry for entries in _installed(group).values() for entry in entries]


def package_of(entry: EntryPoint) -> str:
    """`echo-model 0.1`: the package that declares an entry."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "agentmesh"


@lru_cache
def _installed(group: Group) -> dict[str, list[EntryPoint]]:
    """The entries of installed packages by name. A name of ours is not used: installing a package does not change where
    the prompts of `openai:` go."""
    by_name: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=f"agentmesh.{group}"):
        by_name.setdefault(entry.name, []).append(entry)
        if entry.name in BUILT_IN[group]:
            log.warning(
                "the %s %r of package %s is not used: agentmesh has one of this name",
                NOUNS[group], entry.name, package_of(entry),
            )  # fmt: skip
    return by_name


def _load_error(group: Group, entry: EntryPoint, error: BaseException) -> ConfigError:
    if entry.dist is None and isinstance(error, ImportError) and error.name and entry.extras:
        return ExtraMissing(
            f"the {NOUNS[group]} {entry.name!r} needs {error.name}, which is not installed",
            hint=f"run: pip install 'agentmesh-celery[{','.join(entry.extras)}]'",
        )
    return ConfigError(
        f"the {NOUNS[group]} {entry.name!r} of package {package_of(entry)} cannot be imported: "
        f"{type(error).__name__}: {error}",
        hint=f"correct {entry.value!r}, or uninstall the package",
    )
