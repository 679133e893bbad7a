"""Where local models live, and how a folder comes to be there whole or not at all. Standard library only."""

import contextlib
import datetime
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentmesh.errors import ConfigError

ORIGIN = "agentmesh.json"  # in each folder: where the model came from, written last


@dataclass(frozen=True, slots=True)
class Installed:
    """A model of the cache."""

    name: str
    folder: Path
    bytes: int
    source: str


def cache_folder() -> Path:
    """AGENTMESH_CACHE, or the platform's cache folder."""
    named = os.environ.get("AGENTMESH_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "agentmesh"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "agentmesh"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentmesh"


def model_folder(name: str) -> Path:
    """Where the model of this name is, or would be.

    Raises:
        ConfigError: no such name can be.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ConfigError(f"model name {name!r} must be like 'smollm2' or 'org/model'")
    return cache_folder() / "models" / name.replace("/", "--")


def is_installed(name: str) -> bool:
    """Whether the model is in the cache, whole."""
    return (model_folder(name) / ORIGIN).is_file()


def must_be_installed(name: str) -> None:
    """Go on if the model is in the cache.

    Raises:
        ConfigError: it is not; the message has the command that fetches it.
    """
    if not is_installed(name):
        raise ConfigError(
            f"local model {name!r} is not here ({str(model_folder(name).parent)!r}); agentmesh models pull {name}"
        )


def installed() -> list[Installed]:
    """Every model of the cache, by name."""
    found = []
    for origin in sorted((cache_folder() / "models").glob(f"[!.]*/{ORIGIN}")):  # a dot: still being built
        with contextlib.suppress(FileNotFoundError):  # somebody removes it now
            told = json.loads(origin.read_text())
            size = sum(f.stat().st_size for f in origin.parent.rglob("*") if f.is_file())
            found.append(Installed(told["name"], origin.parent, size, told["source"]))
    return found


def unfinished(name: str) -> list[Path]:
    """What killed processes left of this model where models are: to be removed by whoever holds it (see `holding`)."""
    target = model_folder(name)
    own = re.compile(rf"\.{re.escape(target.name)}-[a-z0-9_]{{8}}")  # as tempfile makes them
    return [f for f in target.parent.glob(f".{target.name}-*") if own.fullmatch(f.name)]


@contextlib.contextmanager
def building(name: str, source: str, *, sha256: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A folder to fill; when the block ends well it becomes the model's folder in one rename, else nothing remains.

    Args:
        source: where the files are from, for people to read.
        sha256: of each file that was fetched.
    """
    target = model_folder(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    folder.chmod(0o755)  # mkdtemp's is for one user alone, and a cache may be shared
    try:
        yield folder
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        (folder / ORIGIN).write_text(
            json.dumps({"name": name, "source": source, "at": at, "sha256": dict(sha256 or {})})
        )
        for file in (*folder.rglob("*"), folder):
            _sync(file)
        _put(folder, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put(folder: Path, target: Path) -> None:
    """Rename; a whole model that another process put there meanwhile stays, for somebody may be reading it."""
    if (target / ORIGIN).is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        folder.rename(target)
    except OSError:
        if not (target / ORIGIN).is_file():
            raise


def _sync(path: Path) -> None:
    if os.name == "nt":  # there is no fsync of what is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
