"""The cache of local models: folders that appear whole or not at all, and the lock of a process that fills one. Standard library only."""

import contextlib
import datetime
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agentmesh.errors import ConfigError

ORIGIN_FILE = "agentmesh.json"  # in each folder: where the model is from; written last


@dataclass(frozen=True, slots=True)
class Installed:
    """A model of the cache."""

    name: str
    folder: Path
    bytes: int
    source: str


def cache_folder() -> Path:
    """AGENTMESH_CACHE, or the platform's cache folder."""
    configured = os.environ.get("AGENTMESH_CACHE")
    if configured:
        return Path(configured)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "agentmesh"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "agentmesh"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentmesh"


def model_folder(name: str) -> Path:
    """The folder of the model of this name, whether it is installed or not.

    Raises:
        ConfigError: the name is malformed.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
        raise ConfigError(
            f"model name {name!r} must be like 'smollm2' or 'org/model'", hint="use letters, digits, `.`, `_`, `-`"
        )
    return cache_folder() / "models" / name.replace("/", "--")


def is_installed(name: str) -> bool:
    """Whether the model is in the cache, whole."""
    return (model_folder(name) / ORIGIN_FILE).is_file()


def must_be_installed(name: str) -> None:
    """Check that the model is in the cache.

    Raises:
        ConfigError: it is not; the hint is the command that fetches it.
    """
    if not is_installed(name):
        raise ConfigError(
            f"local model {name!r} is not here ({str(model_folder(name).parent)!r})",
            hint=f"agentmesh models pull {name}",
        )


def installed_models() -> list[Installed]:
    """Every model of the cache, by name."""
    models = []
    for origin in sorted((cache_folder() / "models").glob(f"[!.]*/{ORIGIN_FILE}")):  # with a dot it is being built
        with contextlib.suppress(FileNotFoundError):  # another process removes it
            origin_data = json.loads(origin.read_text())
            size = sum(f.stat().st_size for f in origin.parent.rglob("*") if f.is_file())
            models.append(Installed(origin_data["name"], origin.parent, size, origin_data["source"]))
    return models


def leftovers(name: str) -> list[Path]:
    """Folders of this model that killed processes left; to be removed under its `model_lock`."""
    target = model_folder(name)
    own = re.compile(rf"\.{re.escape(target.name)}-[a-z0-9_]{{8}}")  # as tempfile makes them
    return [f for f in target.parent.glob(f".{target.name}-*") if own.fullmatch(f.name)]


@contextlib.contextmanager
def build_model_folder(name: str, source: str, *, sha256: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A folder to fill; when the block ends well it becomes the model's folder in one rename, else nothing remains.

    Args:
        source: where the files are from, for people to read.
        sha256: of each file that was fetched, in hex.
    """
    target = model_folder(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    folder.chmod(0o755)  # mkdtemp's mode is for one user, and a cache may be shared
    try:
        yield folder
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        (folder / ORIGIN_FILE).write_text(
            json.dumps({"name": name, "source": source, "at": at, "sha256": dict(sha256 or {})})
        )
        for file in (*folder.rglob("*"), folder):
            _sync(file)
        _publish(folder, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Rename; a whole model that another process put there meanwhile stays, because it may be in use."""
    if (target / ORIGIN_FILE).is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    try:
        folder.rename(target)
    except OSError:
        if not (target / ORIGIN_FILE).is_file():
            raise


def _sync(path: Path) -> None:
    if os.name == "nt":  # there is no fsync of what is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- One process at a time fills or removes a model of the cache. The kernel releases the lock when its process ends

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]  # the type of what is missing


@contextlib.contextmanager
def model_lock(name: str, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Inside, no other process pulls or removes this model.

    Args:
        waiting: called before this waits for another process; None raises instead.

    Raises:
        ConfigError: another process holds the lock, or the cache cannot be written.
    """
    path = cache_folder() / "downloads" / f"{model_folder(name).name}.lock"
    while True:
        handle = _open_lock(path)
        try:
            _lock(handle, name, waiting)
            if _is_current(handle, path):  # else the one before removed the file, and a newer process locks another
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(handle)


def _open_lock(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise ConfigError(
            f"the cache of models {str(cache_folder())!r} cannot be written ({e.strerror})",
            hint="set AGENTMESH_CACHE to a folder that can be",
        ) from None


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _lock(handle: int, name: str, waiting: Callable[[], None] | None) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            raise ConfigError(
                f"another process is pulling model {name!r}",
                hint="wait until it has ended, or stop it, then remove the model",
            ) from None
        waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system without locks, such as some network mounts
        return
