"""Where pip would look for a package's file: its links, its index, its extra indexes. Reads pip's settings, runs nothing."""

import html
import json
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path

from agentmesh.errors import ConfigError, MeshError
from agentmesh.models.fetch import read, shown

try:
    # pip has no public way to ask for its settings; these names are as old as its configuration is
    from pip._internal.configuration import Configuration
    from pip._internal.models.index import PyPI
except ImportError:  # an environment without pip: PIP_INDEX_URL says it
    Configuration = PyPI = None  # type: ignore[assignment,misc]  # the types of what is missing

SIMPLE = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"  # PEP 691


def wheel_url(package: str, version: str) -> str:
    """The address of a package's wheel for every platform.

    Raises:
        ServiceDown, ConfigError: no place that pip is set up for has it; the first one's complaint.
    """
    wheel = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    for link in settings("find-links"):
        file = Path(urllib.request.url2pathname(urllib.parse.urlsplit(link).path) if "://" in link else link) / wheel
        if file.is_file():
            return file.absolute().as_uri()
    problems: list[MeshError] = []
    for index in [*(settings("index-url") or [_default()]), *settings("extra-index-url")]:
        page = f"{index.rstrip('/')}/{package}/"
        try:
            found = [url for url in _files(page) if urllib.parse.urlsplit(url).path.rpartition("/")[2] == wheel]
        except MeshError as e:
            problems.append(e)
            continue
        if found:
            return found[0]
        problems.append(ConfigError(f"{shown(page)} has no {wheel}; set PIP_INDEX_URL to an index that has"))
    raise problems[0]


def settings(name: str) -> list[str]:
    """A setting of pip's, split at blanks: of the environment, else of its configuration; empty if nobody set it."""
    named = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    if named:
        return named.split()
    if Configuration is None:
        return []
    configuration = Configuration(isolated=False)
    configuration.load()
    found: dict[str, object] = {}
    for key, value in configuration.items():  # pip 26 groups by file, the least important first
        found |= value if isinstance(value, dict) else {key: value}
    return str(found.get(f"download.{name}") or found.get(f"global.{name}") or "").split()


def _default() -> str:
    if PyPI is None:
        raise ConfigError("there is no pip here to say which package index to use; set PIP_INDEX_URL")
    return str(PyPI.simple_url)


def _files(page: str) -> list[str]:
    """The files' addresses on a package's page, JSON or HTML."""
    text = read(page, accept=SIMPLE).decode()
    if text.lstrip().startswith("{"):
        links = [str(file["url"]) for file in json.loads(text)["files"]]
    else:
        links = [html.unescape(link) for link in re.findall(r"""<a\s[^>]*?href=["']([^"']+)["']""", text)]
    return [urllib.parse.urljoin(page, link) for link in links]
